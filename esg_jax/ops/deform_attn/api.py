"""Multi-scale deformable attention: one differentiable function, several implementations."""

from typing import Literal

from jax import numpy as jnp
from jaxtyping import Array, Float

from esg_jax.ops.deform_attn.xla import Shapes, deform_attn_xla

Implementation = Literal["xla"]


def deform_attn(
    values_bshd: Float[Array, "B S H D"],
    shapes: Shapes,
    locations_bqhlp2: Float[Array, "B Q H L P 2"],
    weights_bqhlp: Float[Array, "B Q H L P"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "B Q H*D"]:
    """Weighted sum of bilinear samples from several feature maps (Deformable DETR, arXiv 2010.04159, eq. 3).

    Equals PyTorch's `grid_sample(mode="bilinear", padding_mode="zeros", align_corners=False)` per level followed by
    the weighted sum over levels and points. Sums run in float32.

    Args:
      values_bshd: value maps of all levels, each row-major, concatenated along S; float32, bfloat16 or float16.
      shapes: static (height, width) of every level, in pixels; the areas add up to S.
      locations_bqhlp2: (x, y) of every sample in units of its level's width and height: 0 and 1 are the outer edges of
        the first and last pixel. Any finite value is allowed; samples outside the map read zeros. float32.
      weights_bqhlp: attention weights, softmaxed over (L, P) by the caller. float32.
      implementation: forces a backend; None chooses by platform and shape.

    Returns:
      (B, Q, H*D) in the dtype of the values.

    Raises:
      ValueError: shapes of the arguments do not fit together, or the implementation is unknown.
    """
    _check(values_bshd, shapes, locations_bqhlp2, weights_bqhlp)
    if implementation not in (None, "xla"):
        raise ValueError(f"deform_attn: unknown implementation {implementation!r}; use None or 'xla'")
    locations_bqhlp2 = locations_bqhlp2.astype(jnp.float32)
    weights_bqhlp = weights_bqhlp.astype(jnp.float32)
    return deform_attn_xla(values_bshd, shapes, locations_bqhlp2, weights_bqhlp)


def _check(values, shapes, locations, weights):
    if values.ndim != 4 or locations.ndim != 6 or weights.ndim != 5 or locations.shape[-1] != 2:
        raise ValueError(
            "deform_attn: expected values (B, S, H, D), locations (B, Q, H, L, P, 2) and weights (B, Q, H, L, P), got "
            f"{values.shape}, {locations.shape} and {weights.shape}"
        )
    batch, rows, heads, _ = values.shape
    if locations.shape[:-1] != weights.shape or locations.shape[0] != batch or locations.shape[2] != heads:
        raise ValueError(
            f"deform_attn: values {values.shape}, locations {locations.shape} and weights {weights.shape} disagree "
            "about batch, queries, heads, levels or points"
        )
    if len(shapes) != locations.shape[3] or sum(h * w for h, w in shapes) != rows:
        raise ValueError(
            f"deform_attn: {len(shapes)} levels {shapes} hold {sum(h * w for h, w in shapes)} pixels, but values "
            f"have {rows} rows and locations {locations.shape[3]} levels"
        )
