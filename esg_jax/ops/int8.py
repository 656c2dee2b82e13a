"""Weight-only int8: kernels stored as int8 with one scale per output channel, computed with in the activations' type.

A matrix-vector product at batch 1 is bound by reading the weights; half the bytes of bfloat16 are nearly half the time.
The scale comes after the product, so XLA only has to convert the integers on the way into the matrix unit.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8


def quantize_int8(kernel: Float[Array, "... c d"]) -> tuple[Int8[Array, "... c d"], Float[Array, "... d"]]:
    """Symmetric rounding to -127..127: kernel ~ int8 * scale, with an error of at most half a scale.

    Works on numpy arrays (large checkpoints, one tensor at a time) and on jax arrays alike.

    Returns:
        The integers and the float32 scales; an output channel without weights gets scale 1.
    """
    xp = np if isinstance(kernel, np.ndarray) else jnp
    kernel = kernel.astype(xp.float32)
    largest = xp.max(xp.abs(kernel), axis=-2)
    scale = xp.where(largest > 0, largest / 127, 1).astype(xp.float32)
    return xp.round(kernel / scale[..., None, :]).astype(xp.int8), scale


def int8_matmul(
    x: Float[Array, "... c"], kernel: Int8[Array, "c d"], scale: Float[Array, "d"], *, dtype=jnp.float32
) -> Float[Array, "... d"]:
    """x @ (kernel * scale), multiplied in `dtype`, accumulated and scaled in float32; the result is float32."""
    product = jnp.einsum("...c,cd->...d", x.astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.float32)
    return product * scale
