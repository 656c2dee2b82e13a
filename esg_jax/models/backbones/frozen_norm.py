"""Batch normalisation with fixed statistics, as detectors use it with pretrained convolutional backbones.

`BatchNorm` is the same network with statistics that training moves: those of the batch normalise while a training step
asks for it (`use_batch_statistics`), the running ones everywhere else.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class FrozenStat(nnx.Variable):
    """A number that checkpoints hold and no optimizer touches."""


class RunningStat(FrozenStat):
    """A statistic that follows those of the batches; no gradient reaches it either."""


class FrozenBatchNorm(nnx.Module):
    """``(x - mean) / sqrt(var + eps) * scale + bias`` with constant mean and variance.

    `train_affine` makes scale and bias ordinary parameters; otherwise they are constants as well.
    """

    _stat = FrozenStat

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
        self.mean = self._stat(jnp.zeros((features,), jnp.float32))
        self.var = self._stat(jnp.ones((features,), jnp.float32))
        self.epsilon = epsilon
        self.dtype = dtype

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        return self._normalize(x, self.mean[...], self.var[...])

    def _normalize(self, x, mean, var):
        factor = self.scale[...] * jax.lax.rsqrt(var + self.epsilon)
        offset = self.bias[...] - mean * factor
        return x * factor.astype(self.dtype) + offset.astype(self.dtype)


class BatchNorm(FrozenBatchNorm):
    """Normalises with running statistics, or with those of the batch, which then replace them in this module.

    Like Flax and unlike PyTorch, the variance that is kept is the biased one. All statistics are float32.
    """

    _stat = RunningStat

    def __init__(self, features: int, **kwargs):
        super().__init__(features, **kwargs)
        self.axes: tuple[str, ...] | None = None

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        if self.axes is None:
            return super().__call__(x)
        wide, reduced = x.astype(jnp.float32), tuple(range(x.ndim - 1))
        mean = self._over_devices(jnp.mean(wide, reduced))
        var = self._over_devices(jnp.mean((wide - mean) ** 2, reduced))
        self.mean[...], self.var[...] = jax.lax.stop_gradient((mean, var))
        return self._normalize(x, mean, var)

    def _over_devices(self, value: Array) -> Array:
        return jax.lax.pmean(value, self.axes) if self.axes else value


def use_batch_statistics(module: nnx.Module, axes: Sequence[str] = ()) -> None:
    """From here on every `BatchNorm` in `module` normalises with the statistics of its batch and holds them afterwards.

    For a copy of the module that lives within one training step, which averages what `running_statistics` then returns.

    Args:
        module: any; modules without `BatchNorm` do not change.
        axes: named mesh axes over which the batch is split, inside `shard_map` (SyncBN).
    """
    for _, node in nnx.iter_modules(module):
        if isinstance(node, BatchNorm):
            node.axes = tuple(axes)


def running_statistics(module: nnx.Module) -> dict[str, Array]:
    """Dotted name -> mean or variance of every `BatchNorm`."""
    flat = nnx.to_flat_state(nnx.state(module, RunningStat))
    return {".".join(map(str, path)): variable.get_value() for path, variable in flat}
