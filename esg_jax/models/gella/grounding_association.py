"""Association of nouns and entities: inner products of two projections (ESG, eq. 16)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from esg_jax.models import layers

SCALES = ("none", "sqrt_dim", "learned")


@dataclasses.dataclass(frozen=True)
class GroundingAssociationConfig:
    """Sizes of the association module.

    Attributes:
        dim: of the common space.
        depth: 1 (one linear map per side) or 2 (linear, ReLU, linear: the paper's ablation).
        scale: of the logits: "none" (eq. 16), "sqrt_dim" divides by sqrt(dim), "learned" has a temperature and a
            bias, which starts at `bias`.
        bias: about the log-odds of a positive pair, for "learned".
    """

    dim: int = 256
    depth: int = 1
    scale: str = "none"
    bias: float = -4.6

    def __post_init__(self):
        if self.scale not in SCALES:
            raise ValueError(f"association.scale is {self.scale!r}; choose one of {', '.join(SCALES)}")
        if self.depth not in (1, 2):
            raise ValueError(f"association.depth is {self.depth}; choose 1 or 2")


class GroundingAssociation(nnx.Module):
    """Logits of noun-entity pairs; float32 throughout."""

    def __init__(
        self,
        config: GroundingAssociationConfig,
        text_dim: int,
        entity_dim: int,
        *,
        rngs: nnx.Rngs,
        param_dtype=jnp.float32,
    ):
        self.config = config

        def projection(inputs, init):
            sizes = (inputs, *(config.dim,) * config.depth)
            return layers.MLP(sizes, kernel_init=init, rngs=rngs, dtype=jnp.float32, param_dtype=param_dtype)

        # Hidden states of an LLM have large norms; small text projections keep |logits| below about 2 at the start.
        self.text_proj = projection(text_dim, nnx.initializers.variance_scaling(0.01, "fan_in", "normal"))
        self.entity_proj = projection(entity_dim, layers.xavier_uniform)
        if config.scale == "learned":
            self.log_scale = nnx.Param(jnp.zeros((), param_dtype))
            self.bias = nnx.Param(jnp.full((), config.bias, param_dtype))

    def __call__(self, text_bvd: Float[Array, "b v d"], entity_bqc: Float[Array, "b q c"]) -> Float[Array, "b v q"]:
        """Hidden states of `<SEG>` tokens and entity embeddings to logits of "noun v is entity q"."""
        text = self.text_proj(text_bvd.astype(jnp.float32))
        entity = self.entity_proj(entity_bqc.astype(jnp.float32))
        logits = jnp.einsum("bvc,bqc->bvq", text, entity, precision=jax.lax.Precision.HIGHEST)
        if self.config.scale == "sqrt_dim":
            return logits * self.config.dim**-0.5
        if self.config.scale == "learned":
            return logits * jnp.exp(self.log_scale[...]) + self.bias[...]
        return logits
