"""Masked-attention query decoder (Mask2Former, section 3.1; ESG, Fig. 5).

The same weights decode single views (image level) and all views of an image together (batch level): the caller only
chooses which tokens a query may attend to. Mask logits are the inner product of a query's mask embedding with the
mask features. They are linear in the features, so the decoder resizes the features once per level and forms the
low-resolution attention masks directly; full-resolution logits are left to whoever needs them.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from esg_jax.models import layers
from esg_jax.models.cropformer.pixel_decoder import PixelDecoderConfig
from esg_jax.models.positions import sine_position
from esg_jax.ops.resize import resize_bilinear


@dataclasses.dataclass(frozen=True)
class MaskDecoderConfig:
    """Sizes of the query decoder.

    Attributes:
        hidden_dim: channels of queries and memory; equals the pixel decoder's `conv_dim`.
        mask_dim: channels of the mask embedding; equals the pixel decoder's `mask_dim`.
        num_heads, ffn_dim: of every layer.
        num_layers: real layers (the reference's DEC_LAYERS counts the prediction from raw queries as well).
        num_queries: masks per image.
        num_classes: classes without no-object; 1 for entities.
    """

    hidden_dim: int = 256
    mask_dim: int = 256
    num_heads: int = 8
    ffn_dim: int = 2048
    num_layers: int = 9
    num_queries: int = 100
    num_classes: int = 1


def check_widths(pixel_decoder: PixelDecoderConfig, mask_decoder: MaskDecoderConfig) -> None:
    """Raises ValueError when the two decoders of a model do not fit together."""
    if pixel_decoder.conv_dim != mask_decoder.hidden_dim:
        raise ValueError(
            f"pixel_decoder.conv_dim ({pixel_decoder.conv_dim}) must equal "
            f"mask_decoder.hidden_dim ({mask_decoder.hidden_dim})"
        )
    if pixel_decoder.mask_dim != mask_decoder.mask_dim:
        raise ValueError(
            f"pixel_decoder.mask_dim ({pixel_decoder.mask_dim}) must equal "
            f"mask_decoder.mask_dim ({mask_decoder.mask_dim})"
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderOutput:
    """Predictions of the raw queries (index 0) and of every layer (last index: the final one).

    Attributes:
        logits: class logits; the last class is no-object.
        mask_embed: mask embeddings; mask logits are their inner product with the mask features.
    """

    logits: Float[Array, "p n q k"]
    mask_embed: Float[Array, "p n q c"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """One resolution of what queries attend to, tokens of one or several views in a row.

    Attributes:
        tokens: pixel decoder output.
        position: fixed encoding of every token.
        mask_features: mask features resized to this resolution, for the attention mask.
        padding: tokens of padding alone, which no query may attend to; None lets it attend to all, as Mask2Former and
            CropFormer do.
    """

    tokens: Float[Array, "n s c"]
    position: Float[Array, "s c"]
    mask_features: Float[Array, "n s m"]
    padding: Bool[Array, "n s"] | None = None


def image_memory(
    mask_features_nhwm: Float[Array, "n h w m"],
    maps: list[Float[Array, "n _h _w c"]],
    valid_nyx: Bool[Array, "n y x"] | None = None,
) -> list[Memory]:
    """What the queries of single images attend to, from the pixel decoder's two outputs.

    Args:
        mask_features_nhwm, maps: of the pixel decoder.
        valid_nyx: which pixels of the padded images are not padding, to mask keys with; at least one of each image.
            The sides are multiples of those of all maps.
    """
    # Attention masks never carry gradients, so neither do the features they are computed from.
    frozen = jax.lax.stop_gradient(mask_features_nhwm)
    return [
        Memory(
            tokens=_flatten_cells(tokens),
            position=sine_position(*tokens.shape[1:]).reshape(-1, tokens.shape[-1]),
            mask_features=_flatten_cells(resize_bilinear(frozen, tokens.shape[1:3])),
            padding=None if valid_nyx is None else ~_any_in_cell(valid_nyx, tokens.shape[1:3]),
        )
        for tokens in maps
    ]


def _any_in_cell(x_nyx: Bool[Array, "n y x"], cells: tuple[int, int]) -> Bool[Array, "n s"]:
    (count, height, width), (rows, columns) = x_nyx.shape, cells
    return jnp.any(x_nyx.reshape(count, rows, height // rows, columns, width // columns), (2, 4)).reshape(count, -1)


def _flatten_cells(x: Float[Array, "n h w c"]) -> Float[Array, "n s c"]:
    return x.reshape(x.shape[0], -1, x.shape[-1])


class DecoderLayer(nnx.Module):
    """Masked cross attention, self attention, feed-forward."""

    def __init__(self, config: MaskDecoderConfig, *, rngs, dtype, param_dtype):
        kwargs = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.cross = layers.CrossAttentionLayer(config.hidden_dim, config.num_heads, **kwargs)
        self.self_attention = layers.SelfAttentionLayer(config.hidden_dim, config.num_heads, **kwargs)
        self.ffn = layers.FeedForwardLayer(config.hidden_dim, config.ffn_dim, **kwargs)

    def __call__(self, x_nqc, query_embed_qc, memory: Memory, level_embed_c, mask_embed_nqm):
        value = memory.tokens + level_embed_c
        key = value + memory.position.astype(value.dtype)
        logits = jnp.einsum("nqm,nsm->nqs", mask_embed_nqm, memory.mask_features, preferred_element_type=jnp.float32)
        blocked = jax.lax.stop_gradient(logits) < 0
        # A query that may see nothing may see everything, over all views together.
        if memory.padding is None:
            blocked &= ~jnp.all(blocked, axis=-1, keepdims=True)
        else:
            padding = memory.padding[:, None]
            blocked = padding | (blocked & ~jnp.all(blocked | padding, axis=-1, keepdims=True))
        x_nqc = self.cross(x_nqc, query_embed_qc, key, value, blocked)
        x_nqc = self.self_attention(x_nqc, query_embed_qc)
        return self.ffn(x_nqc)


class MaskDecoder(nnx.Module):
    """Queries, decoder layers and prediction heads."""

    def __init__(
        self,
        config: MaskDecoderConfig,
        num_levels: int = 3,
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        remat: bool = False,
    ):
        kwargs = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.remat = remat
        width = config.hidden_dim

        def embedding(rows):
            return nnx.Param(layers.normal_1(rngs.params(), (rows, width), param_dtype))

        self.query_feat = embedding(config.num_queries)
        self.query_embed = embedding(config.num_queries)
        self.level_embed = embedding(num_levels)
        self.layers = nnx.List([DecoderLayer(config, **kwargs) for _ in range(config.num_layers)])
        self.norm = layers.layer_norm(width, **kwargs)
        # The heads decide masks and losses: always float32.
        float32 = dict(kernel_init=layers.torch_linear, rngs=rngs, dtype=jnp.float32, param_dtype=param_dtype)
        self.class_head = nnx.Linear(width, config.num_classes + 1, **float32)
        self.mask_head = layers.MLP((width, width, width, config.mask_dim), **float32)

    def queries(self, count: int) -> Float[Array, "n q c"]:
        """The learned query features, repeated for `count` items."""
        return jnp.broadcast_to(self.query_feat[...], (count, *self.query_feat.shape))

    def predict(self, x_nqc: Float[Array, "n q c"]) -> tuple[Float[Array, "n q k"], Float[Array, "n q m"]]:
        """Class logits and mask embeddings of query states."""
        x = self.norm(x_nqc).astype(jnp.float32)
        return self.class_head(x), self.mask_head(x)

    def __call__(
        self, x_nqc: Float[Array, "n q c"], memory: list[Memory], *, all_predictions: bool = True
    ) -> tuple[DecoderOutput, Float[Array, "n q c"]]:
        """Decodes queries against the memory, whose levels (coarse to fine) the layers visit in turn.

        Args:
            x_nqc: initial query states.
            memory: one entry per level, strides 32, 16, 8.
            all_predictions: keep those of the raw queries and of every layer (deep supervision), not only the last.

        Returns:
            The predictions, and the query states after the last layer, before the final norm.
        """

        query_embed = self.query_embed[...].astype(x_nqc.dtype)

        def visit(group, x, _):
            """Some layers, one per level; also the states after each of them."""
            states = []
            for layer, level, level_embed in zip(group, memory, self.level_embed[...], strict=False):
                # Attention masks carry no gradient: the predictions that count are made below, all at once.
                mask_embed = self.predict(jax.lax.stop_gradient(x))[1]
                x = layer(x, query_embed, level, level_embed.astype(level.tokens.dtype), mask_embed)
                states.append(x)
            return x, jnp.stack(states)

        states = [x_nqc[None]]
        rounds = [nnx.List(self.layers[i : i + len(memory)]) for i in range(0, len(self.layers), len(memory))]
        for equal in (rounds[:-1], rounds[-1:]) if len(rounds[-1]) < len(memory) else (rounds,):
            if equal:
                x_nqc, visited = layers.run_layers(visit, equal, x_nqc, remat=self.remat)
                states.append(visited.reshape(-1, *x_nqc.shape))
        logits, mask_embed = self.predict(jnp.concatenate(states) if all_predictions else x_nqc[None])
        return DecoderOutput(logits, mask_embed), x_nqc
