"""Batch normalisation with fixed statistics, as detectors use it with pretrained convolutional backbones."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class FrozenStat(nnx.Variable):
    """A number that checkpoints hold and no optimizer touches."""


class FrozenBatchNorm(nnx.Module):
    """``(x - mean) / sqrt(var + eps) * scale + bias`` with constant mean and variance.

    `train_affine` makes scale and bias ordinary parameters; otherwise they are constants as well.
    """

    def __init__(
        self,
        features: int,
        *,
        train_affine: bool = False,
        epsilon: float = 1e-5,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
    ):
        affine = nnx.Param if train_affine else FrozenStat
        self.scale = affine(jnp.ones((features,), param_dtype))
        self.bias = affine(jnp.zeros((features,), param_dtype))
        self.mean = FrozenStat(jnp.zeros((features,), jnp.float32))
        self.var = FrozenStat(jnp.ones((features,), jnp.float32))
        self.epsilon = epsilon
        self.dtype = dtype

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        factor = self.scale[...] * jax.lax.rsqrt(self.var[...] + self.epsilon)
        offset = self.bias[...] - self.mean[...] * factor
        return x * factor.astype(self.dtype) + offset.astype(self.dtype)
