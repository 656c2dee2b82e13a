"""Fusion of the full image and its crops, as the definition spells it out (ESG, section 4.1, and the reference code).

Full-size probabilities of every query: for tests, and for users who want them. `painting.py` gives the final masks
without ever forming these maps.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from esg_jax.ops.resize import resize_bilinear


def view_probability(
    logits_qhw: Float[Array, "q h w"], padded: tuple[int, int], size: tuple[int, int], target: tuple[int, int]
) -> Float[Array, "q height width"]:
    """Mask probabilities of one view at its pixels in the original image.

    Args:
        logits_qhw: mask logits at stride 4.
        padded: (height, width) of the padded network input.
        size: (height, width) of the view inside the padding.
        target: (height, width) of the view in original pixels.
    """
    axes = (-2, -1)
    logits = resize_bilinear(logits_qhw, padded, axes=axes)[:, : size[0], : size[1]]
    return jax.nn.sigmoid(resize_bilinear(logits, target, axes=axes))


def fused_probability(
    logits_qthw: Float[Array, "q t h w"],
    padded: tuple[int, int],
    sizes_t2: Int[np.ndarray, "t 2"],
    boxes_t4: Int[np.ndarray, "t 4"],
    original: tuple[int, int],
) -> Float[Array, "q height width"]:
    """Average over the views that cover a pixel, each with weight 1.

    Args:
        logits_qthw: mask logits of the views at stride 4.
        padded: (height, width) of the padded views.
        sizes_t2: (height, width) of the views without padding.
        boxes_t4: (x0, y0, x1, y1) of the views in original pixels, half open.
        original: (height, width) of the image.
    """
    total = jnp.zeros((logits_qthw.shape[0], *original))
    count = np.zeros(original, np.float32)
    for view, (size, box) in enumerate(zip(sizes_t2.tolist(), boxes_t4.tolist(), strict=True)):
        x0, y0, x1, y1 = box
        probability = view_probability(logits_qthw[:, view], padded, tuple(size), (y1 - y0, x1 - x0))
        total = total.at[:, y0:y1, x0:x1].add(probability)
        count[y0:y1, x0:x1] += 1
    return total / (count + 1e-16)
