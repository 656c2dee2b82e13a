"""Multi-scale deformable attention."""

from esg_jax.ops.deform_attn.api import deform_attn

__all__ = ["deform_attn"]
