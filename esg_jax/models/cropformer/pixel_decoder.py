"""Multi-scale deformable pixel decoder: backbone maps to mask features and memory (Mask2Former, section 3.2)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from esg_jax.models import layers
from esg_jax.models.positions import sine_position
from esg_jax.ops.conv import conv3x3
from esg_jax.ops.deform_attn.api import deform_attn
from esg_jax.ops.resize import resize_bilinear


@dataclasses.dataclass(frozen=True)
class PixelDecoderConfig:
    """Sizes of the pixel decoder.

    Attributes:
        conv_dim: channels of the encoder tokens, a multiple of 32.
        mask_dim: channels of the mask features.
        num_layers: encoder layers.
        num_heads, num_points: of the deformable attention.
        ffn_dim: hidden width of the encoder's feed-forward layers. The reference hard-codes 1024 and ignores its
            config value.
    """

    conv_dim: int = 256
    mask_dim: int = 256
    num_layers: int = 6
    num_heads: int = 8
    num_points: int = 4
    ffn_dim: int = 1024

    def __post_init__(self):
        if self.conv_dim % 32:
            raise ValueError(f"pixel_decoder.conv_dim must be a multiple of 32 (group norm), got {self.conv_dim}")


class DeformableAttention(nnx.Module):
    """Multi-scale deformable attention: each query samples a few learned points on every level."""

    def __init__(self, features: int, num_heads: int, num_levels: int, num_points: int, *, rngs, dtype, param_dtype):
        self.shape_hlp = (num_heads, num_levels, num_points)
        samples = math.prod(self.shape_hlp)
        self.sampling_offsets = nnx.Linear(
            features,
            samples * 2,
            kernel_init=nnx.initializers.zeros,
            bias_init=lambda key, shape, dtype: jnp.asarray(_offset_bias(self.shape_hlp), dtype),
            # Positions in bfloat16 would be off by a third of a pixel on a 167-wide map.
            dtype=jnp.float32,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.attention_weights = nnx.Linear(
            features, samples, kernel_init=nnx.initializers.zeros, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )

        def linear():
            return nnx.Linear(
                features, features, kernel_init=layers.xavier_uniform, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

        self.value, self.out = linear(), linear()

    def __call__(
        self,
        query_bqc: Float[Array, "b q c"],
        value_bsc: Float[Array, "b s c"],
        reference_q2: Float[Array, "q 2"],
        shapes: tuple[tuple[int, int], ...],
    ) -> Float[Array, "b q c"]:
        """Samples `value` around `reference`.

        Args:
            query_bqc: queries with their positions added.
            value_bsc: tokens of all levels, row-major, levels concatenated.
            reference_q2: (x, y) of every query in [0, 1].
            shapes: (height, width) of every level.
        """
        batch, num_queries, _ = query_bqc.shape
        heads, levels, points = self.shape_hlp
        value = self.value(value_bsc).reshape(batch, value_bsc.shape[1], heads, -1)
        offsets = self.sampling_offsets(query_bqc).reshape(batch, num_queries, heads, levels, points, 2)
        size_l2 = np.array(shapes, np.float32)[:, ::-1].copy()  # (w, h), to fit offsets in (x, y)
        locations = reference_q2[None, :, None, None, None, :] + offsets / size_l2[:, None, :]
        weights = self.attention_weights(query_bqc).reshape(batch, num_queries, heads, levels * points)
        weights = jax.nn.softmax(weights.astype(jnp.float32), axis=-1)
        weights = weights.reshape(batch, num_queries, heads, levels, points)
        return self.out(deform_attn(value, shapes, locations, weights))


def _offset_bias(shape_hlp: tuple[int, int, int]) -> np.ndarray:
    """Initial offsets: head h looks along direction 2*pi*h/heads, its p-th point p+1 cells away."""
    heads, levels, points = shape_hlp
    theta = 2 * math.pi * np.arange(heads) / heads
    direction = np.stack([np.cos(theta), np.sin(theta)], -1)
    direction /= np.abs(direction).max(-1, keepdims=True)
    steps = np.arange(1, points + 1)[:, None]
    bias = direction[:, None, None, :] * steps  # heads 1 points 2
    return np.broadcast_to(bias, (heads, levels, points, 2)).reshape(-1)


class EncoderLayer(nnx.Module):
    """Post-norm deformable self attention and feed-forward layer."""

    def __init__(self, config: PixelDecoderConfig, num_levels: int, *, rngs, dtype, param_dtype):
        kwargs = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.attention = DeformableAttention(config.conv_dim, config.num_heads, num_levels, config.num_points, **kwargs)
        self.norm = layers.layer_norm(config.conv_dim, **kwargs)
        self.ffn = layers.FeedForwardLayer(config.conv_dim, config.ffn_dim, **kwargs)

    def __call__(self, x_bsc, position_sc, reference_s2, shapes):
        attended = self.attention(x_bsc + position_sc, x_bsc, reference_s2, shapes)
        return self.ffn(self.norm(x_bsc + attended))


class Conv3x3(nnx.Module):
    """3x3 convolution without bias."""

    def __init__(self, inputs: int, outputs: int, *, kernel_init, rngs, dtype, param_dtype):
        self.dtype = dtype
        self.kernel = nnx.Param(kernel_init(rngs.params(), (3, 3, inputs, outputs), param_dtype))

    def __call__(self, x_bhwc):
        return conv3x3(x_bhwc.astype(self.dtype), self.kernel[...].astype(self.dtype))


class ConvNorm(nnx.Module):
    """1x1 (with bias) or 3x3 (without) convolution followed by GroupNorm."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, use_bias, kernel_init, rngs, dtype, param_dtype):
        kwargs = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        if kernel == 1:
            # A matrix product says the same, and its gradient is three times faster on CPU.
            self.conv = nnx.Linear(inputs, outputs, use_bias=use_bias, kernel_init=kernel_init, **kwargs)
        else:
            self.conv = Conv3x3(inputs, outputs, kernel_init=kernel_init, **kwargs)
        self.norm = layers.group_norm(outputs, **kwargs)

    def __call__(self, x_bhwc):
        return self.norm(self.conv(x_bhwc))


class PixelDecoder(nnx.Module):
    """Deformable encoder over strides 32, 16 and 8, then one top-down step to stride 4."""

    def __init__(
        self,
        config: PixelDecoderConfig,
        in_channels: tuple[int, int, int, int],
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        remat: bool = False,
    ):
        """`in_channels` are those of res2..res5."""
        kwargs = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.remat = remat
        width = config.conv_dim
        res2, *deep = in_channels
        # Coarse to fine, the order of the encoder's tokens.
        self.input_proj = nnx.List(
            [ConvNorm(c, width, 1, use_bias=True, kernel_init=layers.xavier_uniform, **kwargs) for c in reversed(deep)]
        )
        self.level_embed = nnx.Param(layers.normal_1(rngs.params(), (len(deep), width), param_dtype))
        self.layers = nnx.List([EncoderLayer(config, len(deep), **kwargs) for _ in range(config.num_layers)])
        kwargs["kernel_init"] = layers.kaiming_uniform
        self.lateral = ConvNorm(res2, width, 1, use_bias=False, **kwargs)
        self.output = ConvNorm(width, width, 3, use_bias=False, **kwargs)
        self.mask_features = nnx.Linear(width, config.mask_dim, **kwargs)

    def __call__(
        self, features: tuple[Float[Array, "b _h _w _c"], ...]
    ) -> tuple[Float[Array, "b h4 w4 c"], list[Float[Array, "b _h _w c"]]]:
        """Maps res2..res5 to (mask features at stride 4, [memory at strides 32, 16, 8])."""
        res2, *deep = features
        maps = [proj(x) for proj, x in zip(self.input_proj, reversed(deep), strict=True)]
        shapes = tuple((x.shape[1], x.shape[2]) for x in maps)
        width = maps[0].shape[-1]
        tokens = jnp.concatenate([x.reshape(x.shape[0], -1, width) for x in maps], axis=1)
        position = jnp.concatenate(
            [
                (sine_position(h, w, width) + self.level_embed[level]).reshape(h * w, width)
                for level, (h, w) in enumerate(shapes)
            ]
        ).astype(tokens.dtype)
        reference = jnp.concatenate([_cell_centres(h, w) for h, w in shapes])

        def run(layer, x, _):
            return layer(x, position, reference, shapes), None

        tokens, _ = layers.run_layers(run, self.layers, tokens, remat=self.remat)

        splits = np.cumsum([h * w for h, w in shapes])[:-1]
        memory = [
            x.reshape(x.shape[0], h, w, width)
            for x, (h, w) in zip(jnp.split(tokens, splits, axis=1), shapes, strict=True)
        ]
        lateral = self.lateral(res2)
        top_down = resize_bilinear(memory[-1], lateral.shape[1:3])
        stride4 = jax.nn.relu(self.output(lateral + top_down))
        return self.mask_features(stride4), memory


def _cell_centres(height: int, width: int) -> Float[Array, "s 2"]:
    """(x, y) in [0, 1] of the centre of every cell, row-major."""
    y = (jnp.arange(height, dtype=jnp.float32) + 0.5) / height
    x = (jnp.arange(width, dtype=jnp.float32) + 0.5) / width
    grid_y, grid_x = jnp.meshgrid(y, x, indexing="ij")
    return jnp.stack([grid_x, grid_y], axis=-1).reshape(-1, 2)
