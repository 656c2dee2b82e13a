"""Multi-scale deformable attention."""

from esg_jax.ops.deform_attn.api import available_implementations, deform_attn

__all__ = ["available_implementations", "deform_attn"]
