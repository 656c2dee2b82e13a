"""Low-rank adapters for the stacked kernels of a `Llama`.

An adapter adds scale * (x down) up to the output of a projection; `up` starts at zero, so an untrained adapter changes
nothing. Adapters are a module of their own, given to `Llama.__call__`: training takes the gradient of that module
alone, and the base weights may be frozen, bfloat16 or int8.

Source: LoRA (Hu et al. 2021, section 4.1).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from esg_jax.models.language.llama import Llama, LlamaConfig

_ATTENTION = ("query", "key", "value", "out")
_MLP = ("gate", "up", "down")
# PyTorch's kaiming_uniform(a=sqrt(5)), which published adapters start from.
_down_init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=(0,))


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Sizes of the adapters; the defaults are those of LISA.

    Attributes:
        rank: of the update of every kernel.
        alpha: the update is scaled by alpha / rank.
        dropout: share of the inputs that training drops.
        targets: which projections, of query, key, value, out, gate, up, down.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ("query", "value")

    def __post_init__(self):
        unknown = [name for name in self.targets if name not in _ATTENTION + _MLP]
        if unknown or len(set(self.targets)) != len(self.targets):
            known = ", ".join(_ATTENTION + _MLP)
            raise ValueError(f"LoRA targets {self.targets} must be different names out of {known}")
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA rank ({self.rank}) must be positive and dropout ({self.dropout}) in [0, 1)")


class LoraAdapter(nnx.Module):
    """One projection's update, with a leading layer axis that must be sliced away before a call."""

    def __init__(self, config: LoraConfig, num_layers: int, fan_in: int, fan_out: int, *, rngs, dtype, param_dtype):
        self.factor = config.alpha / config.rank
        self.dropout = config.dropout
        self.dtype = dtype
        self.down = nnx.Param(_down_init(rngs.params(), (num_layers, fan_in, config.rank), param_dtype))
        self.up = nnx.Param(jnp.zeros((num_layers, config.rank, fan_out), param_dtype))

    def __call__(self, x: Float[Array, "... c"], key: Array | None) -> Float[Array, "... d"]:
        x = x.astype(self.dtype)
        if key is not None and self.dropout:
            keep = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.dropout), 0)
        return x @ self.down[...].astype(self.dtype) @ self.up[...].astype(self.dtype) * self.factor

    def update(self) -> Float[Array, "l c d"]:
        """What the adapter amounts to as a change of the stacked kernel, float32."""
        down, up = self.down[...].astype(jnp.float32), self.up[...].astype(jnp.float32)
        return self.factor * jnp.einsum("lcr,lrd->lcd", down, up, precision=jax.lax.Precision.HIGHEST)


class Lora(nnx.Module):
    """All adapters of a language model."""

    def __init__(
        self, config: LoraConfig, llama: LlamaConfig, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32
    ):
        self.config = config
        kv_width = llama.num_kv_heads * llama.head_dim
        sizes = dict.fromkeys(_ATTENTION, (llama.width, llama.width))
        sizes |= dict.fromkeys(("key", "value"), (llama.width, kv_width))
        sizes |= dict.fromkeys(("gate", "up"), (llama.width, llama.ffn_dim))
        sizes["down"] = (llama.ffn_dim, llama.width)
        kwargs = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.adapters = nnx.Dict(
            {name: LoraAdapter(config, llama.num_layers, *sizes[name], **kwargs) for name in config.targets}
        )


def merge(model: Llama, lora: Lora) -> Llama:
    """A model whose kernels include the adapters: the same function without their cost.

    Raises:
        ValueError: an adapted kernel is quantised.
    """
    return _added(model, lora, 1)


def unmerge(model: Llama, lora: Lora) -> Llama:
    """The inverse of `merge`, up to the rounding of the kernels' type.

    Raises:
        ValueError: an adapted kernel is quantised.
    """
    return _added(model, lora, -1)


def _added(model: Llama, lora: Lora, sign: int) -> Llama:
    model = nnx.clone(model)
    for name, adapter in lora.adapters.items():
        parent = model.layers.attention if name in _ATTENTION else model.layers.mlp
        kernel = getattr(parent, name).kernel
        if not jnp.issubdtype(kernel.dtype, jnp.floating):
            raise ValueError(f"the {name} kernel is {kernel.dtype}: merge adapters before quantising the model")
        kernel[...] = (kernel[...].astype(jnp.float32) + sign * adapter.update()).astype(kernel.dtype)
    return model
