"""View association: image-level queries of all views become the queries of the batch-level decoder (ESG, Eq. 4-5)."""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from esg_jax.models import layers


@dataclasses.dataclass(frozen=True)
class AssociationConfig:
    """Sizes of the association module; `num_layers` is the reference's FUSE_NUM_LAYERS."""

    num_layers: int = 1
    num_heads: int = 8
    ffn_dim: int = 2048


class AssociationLayer(nnx.Module):
    """Cross attention to the queries of all views, self attention without positions, feed-forward."""

    def __init__(self, config: AssociationConfig, hidden_dim: int, *, rngs, dtype, param_dtype):
        kwargs = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.cross = layers.CrossAttentionLayer(hidden_dim, config.num_heads, **kwargs)
        self.self_attention = layers.SelfAttentionLayer(hidden_dim, config.num_heads, **kwargs)
        self.ffn = layers.FeedForwardLayer(hidden_dim, config.ffn_dim, **kwargs)

    def __call__(self, x_bqc, query_embed_qc, key_bsc, value_bsc):
        x_bqc = self.cross(x_bqc, query_embed_qc, key_bsc, value_bsc)
        return self.ffn(self.self_attention(x_bqc))


class ViewAssociation(nnx.Module):
    """Gathers, for every query of the full image, what the same entity looks like in the crops."""

    def __init__(
        self,
        config: AssociationConfig,
        hidden_dim: int,
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
    ):
        self.layers = nnx.List(
            [
                AssociationLayer(config, hidden_dim, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
                for _ in range(config.num_layers)
            ]
        )

    def __call__(
        self, states_btqc: Float[Array, "b t q c"], query_embed_qc: Float[Array, "q c"]
    ) -> Float[Array, "b q c"]:
        """Batch-level queries from the image-level query states of all views; view 0 is the full image."""
        batch, views, queries, width = states_btqc.shape
        value = states_btqc.reshape(batch, views * queries, width)
        key = (states_btqc + query_embed_qc).reshape(value.shape)
        x_bqc = states_btqc[:, 0]
        for layer in self.layers:
            x_bqc = layer(x_bqc, query_embed_qc, key, value)
        return x_bqc
