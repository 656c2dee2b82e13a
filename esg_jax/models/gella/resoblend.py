"""ResoBlend: image features and colormap features become one pyramid (ESG, section 4.3, eq. 14-15).

Taken literally, the equations let all detail of the masks pass through the image encoder's coarse grid; the module is
introduced as augmenting the colormap's pyramid, however. `mode` selects the reading:

    "paper_skip"   eq. 14-15, then the colormap's own features are added at every level (default)
    "paper"        eq. 14-15 only
    "pixel_query"  the colormap's pixels are the queries, the image tokens keys and values
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from esg_jax.models import layers
from esg_jax.models.cropformer.pixel_decoder import ConvNorm
from esg_jax.models.positions import sine_position
from esg_jax.ops.resize import resize_bilinear

MODES = ("paper_skip", "paper", "pixel_query")

# Attention logits held at one time, per head; beyond, queries are processed in chunks.
_MAX_LOGITS = 2**24


@dataclasses.dataclass(frozen=True)
class ResoBlendConfig:
    """Sizes and ablation switches; the paper gives no widths.

    Attributes:
        mode: wiring, see the module.
        dim: channels of all features inside and of the result, a multiple of 32.
        num_heads, ffn_dim: of the attention and feed-forward layers.
        use_sa, use_ca, use_ff, use_res, use_conv: Table 17: self attention on the image tokens, cross attention with
            the colormap, feed-forward, the residual of eq. 14, the convolution of eq. 15.
        ca_residual: a second residual and norm around the cross attention; eq. 14 shows none.
        conv_norm: GroupNorm and ReLU after the convolution.
        ca_kv_pool: average pooling of the stride-4 features before they become keys and values; 0 pools by 4 when the
            colormap is 1024 pixels or larger, 1 never.
    """

    mode: str = "paper_skip"
    dim: int = 256
    num_heads: int = 8
    ffn_dim: int = 1024
    use_sa: bool = True
    use_ca: bool = True
    use_ff: bool = True
    use_res: bool = True
    use_conv: bool = True
    ca_residual: bool = False
    conv_norm: bool = False
    ca_kv_pool: int = 0

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"resoblend.mode is {self.mode!r}; choose one of {', '.join(MODES)}")
        if self.dim % 32:
            raise ValueError(f"resoblend.dim must be a multiple of 32 (group norm), got {self.dim}")


class ResoBlendLevel(nnx.Module):
    """What belongs to one stride: lateral, cross attention, feed-forward, convolution."""

    def __init__(self, config: ResoBlendConfig, inputs: int, *, rngs, dtype, param_dtype):
        kwargs = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        dim = config.dim
        self.config = config
        self.lateral = ConvNorm(inputs, dim, 1, use_bias=True, kernel_init=layers.xavier_uniform, **kwargs)
        self.level_embed = nnx.Param(layers.normal_1(rngs.params(), (dim,), param_dtype))
        self.cross = layers.MultiHeadAttention(dim, config.num_heads, **kwargs) if config.use_ca else None
        self.cross_norm = layers.layer_norm(dim, **kwargs) if config.use_ca and config.ca_residual else None
        self.ffn = layers.MLP((dim, config.ffn_dim, dim), **kwargs) if config.use_ff else None
        self.conv = (
            nnx.Conv(dim, dim, (3, 3), padding=1, kernel_init=layers.kaiming_uniform, **kwargs)
            if config.use_conv
            else None
        )
        self.conv_norm = layers.group_norm(dim, **kwargs) if config.use_conv and config.conv_norm else None

    def __call__(self, features_bhwc, image_bgc, blended_bgc, grid: tuple[int, int], pool: int):
        """`image` is the projected image grid Z, `blended` Z' after self attention, both (B, G*G, C)."""
        config = self.config
        lateral = self.lateral(features_bhwc)
        height, width = lateral.shape[1:3]
        if config.mode == "pixel_query":
            x = self._mix(_tokens(lateral), _position(lateral), blended_bgc, _grid_position(grid, config.dim))
            if config.use_res:
                x = x + _tokens(lateral)
            return self._convolve(x.reshape(lateral.shape))
        memory = _pool(lateral, pool)
        position = _position(memory) + self.level_embed[...].astype(memory.dtype)
        x = self._mix(blended_bgc, _grid_position(grid, config.dim), _tokens(memory), position)
        if config.use_res:
            x = x + image_bgc
        x = self._convolve(x.reshape(x.shape[0], *grid, config.dim))
        x = resize_bilinear(x, (height, width)).astype(lateral.dtype)
        if config.mode == "paper":
            return x
        # Without cross attention nothing of the image enters: the mask features stay isolated.
        return lateral + x if config.use_ca else lateral

    def _mix(self, query, query_position, value, value_position):
        x = query
        if self.cross is not None:
            x = _attend(self.cross, query + query_position.astype(query.dtype), value + value_position, value)
            if self.cross_norm is not None:
                x = self.cross_norm(query + x)
        return x if self.ffn is None else self.ffn(x)

    def _convolve(self, x):
        if self.conv is None:
            return x
        x = self.conv(x)
        return x if self.conv_norm is None else jax.nn.relu(self.conv_norm(x))


class ResoBlend(nnx.Module):
    """Blends image tokens into a feature pyramid of the colormap."""

    def __init__(
        self,
        config: ResoBlendConfig,
        image_channels: int,
        in_channels: tuple[int, ...],
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
    ):
        """`in_channels` are those of the colormap's maps, at strides 4, 8, 16, 32."""
        kwargs = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.config = config
        self.image_proj = nnx.Linear(image_channels, config.dim, kernel_init=layers.xavier_uniform, **kwargs)
        self.self_attention = (
            layers.SelfAttentionLayer(config.dim, config.num_heads, **kwargs) if config.use_sa else None
        )
        self.levels = nnx.List([ResoBlendLevel(config, channels, **kwargs) for channels in in_channels])

    def __call__(
        self, image_bghc: Float[Array, "b g1 g2 v"], features: tuple[Float[Array, "b _h _w _c"], ...]
    ) -> tuple[Float[Array, "b _h _w c"], ...]:
        """Image grid and pyramid to a pyramid of the same shapes with `dim` channels."""
        grid = image_bghc.shape[1:3]
        image = self.image_proj(_tokens(image_bghc))
        blended = image
        if self.self_attention is not None:
            blended = self.self_attention(image, _grid_position(grid, self.config.dim).astype(image.dtype))
        outputs = []
        for index, (level, x) in enumerate(zip(self.levels, features, strict=True)):
            pool = self._pool(x.shape[1]) if index == 0 else 1
            outputs.append(level(x, image, blended, grid, pool))
        return tuple(outputs)

    def _pool(self, stride4_side: int) -> int:
        if self.config.ca_kv_pool:
            return self.config.ca_kv_pool
        return 4 if stride4_side >= 256 else 1


def _attend(attention: layers.MultiHeadAttention, query_bqc, key_bsc, value_bsc):
    """Attention in chunks of queries, recomputed in the backward pass, when its logits would be large."""
    queries, keys = query_bqc.shape[1], key_bsc.shape[1]
    divisors = (count for count in range(1, queries + 1) if queries % count == 0)
    chunks = next((count for count in divisors if queries // count * keys <= _MAX_LOGITS), queries)
    if chunks == 1:
        return attention(query_bqc, key_bsc, value_bsc)
    parts = query_bqc.reshape(len(query_bqc), chunks, -1, query_bqc.shape[-1]).swapaxes(0, 1)
    run = jax.checkpoint(lambda part: attention(part, key_bsc, value_bsc))
    return jax.lax.map(run, parts).swapaxes(0, 1).reshape(query_bqc.shape)


def _pool(x_bhwc, factor: int):
    if factor == 1:
        return x_bhwc
    batch, height, width, channels = x_bhwc.shape
    return x_bhwc.reshape(batch, height // factor, factor, width // factor, factor, channels).mean((2, 4))


def _tokens(x_bhwc: Float[Array, "b h w c"]) -> Float[Array, "b s c"]:
    return x_bhwc.reshape(x_bhwc.shape[0], -1, x_bhwc.shape[-1])


def _position(x_bhwc) -> Float[Array, "s c"]:
    return _grid_position(x_bhwc.shape[1:3], x_bhwc.shape[-1]).astype(x_bhwc.dtype)


def _grid_position(grid, channels: int) -> Float[Array, "s c"]:
    return sine_position(*grid, channels).reshape(-1, channels)
