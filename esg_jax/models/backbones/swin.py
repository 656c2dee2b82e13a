"""Swin transformer (Liu et al. 2021), detection variant: any image size, outputs of all four stages.

Numbers follow the detection code base in three places where other ports differ: maps are padded to whole windows
*after* the first norm and padded tokens are attended to in unshifted blocks; tokens of different regions of a shifted
window get -100 added instead of minus infinity; neither window nor shift shrinks on maps smaller than a window.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from esg_jax.models import layers

_REGION_PENALTY = -100.0
_trunc_normal = nnx.initializers.truncated_normal(0.02)


@dataclasses.dataclass(frozen=True)
class SwinConfig:
    """Sizes of a Swin transformer.

    Attributes:
        embed_dim: channels at stride 4, doubled from stage to stage.
        depths, num_heads: blocks and attention heads per stage.
        window_size: side of the attention windows, in tokens.
        mlp_ratio: hidden width of the perceptrons relative to the channels.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first one.
    """

    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window_size: int = 7
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.3

    def __post_init__(self):
        if len(self.depths) != len(self.num_heads):
            raise ValueError(f"swin: depths {self.depths} and num_heads {self.num_heads} differ in length")

    @classmethod
    def tiny(cls) -> "SwinConfig":
        """Swin-T: 27.5 M parameters."""
        return cls(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24))

    @classmethod
    def large(cls, window_size: int = 7) -> "SwinConfig":
        """Swin-L: 195 M parameters; the class-aware models use window 12."""
        return cls(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), window_size=window_size)


@functools.cache
def relative_position_index(window: int) -> np.ndarray:
    """Row of the bias table for every (query, key) pair of a window, shape (window**2, window**2), int32."""
    y, x = (axis.reshape(-1) for axis in np.mgrid[:window, :window])
    dy, dx = y[:, None] - y[None], x[:, None] - x[None]
    return ((dy + window - 1) * (2 * window - 1) + dx + window - 1).astype(np.int32)


@functools.cache
def _shift_penalty(height: int, width: int, window: int, shift: int) -> np.ndarray:
    """-100 between tokens of a shifted window that are not neighbours in the image: (windows, n, n)."""

    def regions(size):
        index = np.arange(size)
        return np.where(index < size - window, 0, np.where(index < size - shift, 1, 2))

    region = regions(height)[:, None] * 3 + regions(width)[None]
    region = region.reshape(height // window, window, width // window, window)
    region = region.transpose(0, 2, 1, 3).reshape(-1, window * window)
    return np.where(region[:, :, None] != region[:, None, :], _REGION_PENALTY, 0.0).astype(np.float32)


class WindowAttention(nnx.Module):
    """Self attention inside windows, with a learned bias per relative position and head."""

    def __init__(self, features: int, num_heads: int, window_size: int, *, rngs, dtype, param_dtype):
        kwargs = dict(kernel_init=layers.torch_linear, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.num_heads = num_heads
        self.window_size = window_size
        self.qkv = nnx.Linear(features, 3 * features, **kwargs)
        self.proj = nnx.Linear(features, features, **kwargs)
        self.relative_position_bias_table = nnx.Param(
            _trunc_normal(rngs.params(), ((2 * window_size - 1) ** 2, num_heads), param_dtype)
        )

    def __call__(
        self, x_bwnc: Float[Array, "b w n c"], penalty_wnn: Float[np.ndarray, "w n n"] | None
    ) -> Float[Array, "b w n c"]:
        """Attends within each of the `w` windows of `n` tokens; `penalty` is added to the logits."""
        batch, windows, tokens, channels = x_bwnc.shape
        qkv = self.qkv(x_bwnc).reshape(batch, windows, tokens, 3, self.num_heads, -1)
        query, key, value = qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]
        query = query * query.shape[-1] ** -0.5
        logits = jnp.einsum("bwqhd,bwkhd->bwhqk", query, key, preferred_element_type=jnp.float32)
        table = self.relative_position_bias_table[...].astype(jnp.float32)
        bias = table[relative_position_index(self.window_size)]  # n n heads
        logits = logits + bias.transpose(2, 0, 1)
        if penalty_wnn is not None:
            logits = logits + penalty_wnn[:, None]
        weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
        attended = jnp.einsum("bwhqk,bwkhd->bwqhd", weights, value)
        return self.proj(attended.reshape(batch, windows, tokens, channels))


class SwinBlock(nnx.Module):
    """Pre-norm windowed attention and perceptron; odd blocks shift the windows by half their size."""

    def __init__(
        self, features: int, num_heads: int, window_size: int, shift: int, mlp_ratio: float, *, rngs, dtype, param_dtype
    ):
        kwargs = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        hidden = int(features * mlp_ratio)
        self.window_size = window_size
        self.shift = shift
        self.norm1 = layers.layer_norm(features, **kwargs)
        self.attention = WindowAttention(features, num_heads, window_size, **kwargs)
        self.norm2 = layers.layer_norm(features, **kwargs)
        self.fc1 = nnx.Linear(features, hidden, kernel_init=layers.torch_linear, **kwargs)
        self.fc2 = nnx.Linear(hidden, features, kernel_init=layers.torch_linear, **kwargs)

    def __call__(
        self, x_bhwc: Float[Array, "b h w c"], keep_b: Float[Array, "2 b"] | None = None
    ) -> Float[Array, "b h w c"]:
        """`keep` scales the two residual branches of every sample (stochastic depth); None keeps them."""
        attended = self._attend(self.norm1(x_bhwc))
        x_bhwc = x_bhwc + _scale(attended, keep_b, 0)
        hidden = jax.nn.gelu(self.fc1(self.norm2(x_bhwc)), approximate=False)
        return x_bhwc + _scale(self.fc2(hidden), keep_b, 1)

    def _attend(self, x_bhwc):
        batch, height, width, channels = x_bhwc.shape
        window, shift = self.window_size, self.shift
        x = jnp.pad(x_bhwc, ((0, 0), (0, -height % window), (0, -width % window), (0, 0)))
        rows, columns = x.shape[1] // window, x.shape[2] // window
        penalty = None
        if shift:
            x = jnp.roll(x, (-shift, -shift), axis=(1, 2))
            penalty = _shift_penalty(x.shape[1], x.shape[2], window, shift)
        x = x.reshape(batch, rows, window, columns, window, channels).swapaxes(2, 3)
        # Windows keep an axis of their own, so that a sharded batch axis is never merged.
        x = self.attention(x.reshape(batch, rows * columns, window * window, channels), penalty)
        x = x.reshape(batch, rows, columns, window, window, channels).swapaxes(2, 3)
        x = x.reshape(batch, rows * window, columns * window, channels)
        if shift:
            x = jnp.roll(x, (shift, shift), axis=(1, 2))
        return x[:, :height, :width]


def _run_blocks(blocks, x_bhwc, keep):
    for index, block in enumerate(blocks):
        x_bhwc = block(x_bhwc, None if keep is None else keep[index])
    return x_bhwc, None


def _scale(x_bhwc, keep_b, branch):
    return x_bhwc if keep_b is None else x_bhwc * keep_b[branch][:, None, None, None].astype(x_bhwc.dtype)


class PatchMerging(nnx.Module):
    """Halves the resolution: 2x2 neighbours are concatenated, normalised and projected to twice the channels."""

    def __init__(self, features: int, *, rngs, dtype, param_dtype):
        kwargs = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.norm = layers.layer_norm(4 * features, **kwargs)
        self.reduction = nnx.Linear(
            4 * features, 2 * features, use_bias=False, kernel_init=layers.torch_linear, **kwargs
        )

    def __call__(self, x_bhwc: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        batch, height, width, channels = x_bhwc.shape
        x = jnp.pad(x_bhwc, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
        x = x.reshape(batch, x.shape[1] // 2, 2, x.shape[2] // 2, 2, channels)
        # Order of the concatenation: (row, column) = (0,0), (1,0), (0,1), (1,1).
        x = x.transpose(0, 1, 3, 4, 2, 5).reshape(batch, x.shape[1], x.shape[3], 4 * channels)
        return self.reduction(self.norm(x))


class Swin(nnx.Module):
    """Patch embedding and stages of windowed attention; every stage's output gets a norm of its own."""

    def __init__(
        self,
        config: SwinConfig,
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        remat: bool = False,
    ):
        """Creates the parameters; `remat` recomputes every block in the backward pass."""
        kwargs = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.remat = remat
        self.depths = config.depths
        self.drop_path_rate = config.drop_path_rate
        self.patch_embed = nnx.Conv(
            3, config.embed_dim, (4, 4), strides=4, padding="VALID", kernel_init=layers.torch_linear, **kwargs
        )
        self.patch_norm = layers.layer_norm(config.embed_dim, **kwargs)
        self.stages, self.merges, self.norms = nnx.List(), nnx.List(), nnx.List()
        out_channels = []
        for stage, (depth, heads) in enumerate(zip(config.depths, config.num_heads, strict=True)):
            features = config.embed_dim * 2**stage
            shifts = [config.window_size // 2 if block % 2 else 0 for block in range(depth)]
            self.stages.append(
                nnx.List(
                    [
                        SwinBlock(features, heads, config.window_size, shift, config.mlp_ratio, **kwargs)
                        for shift in shifts
                    ]
                )
            )
            self.norms.append(layers.layer_norm(features, **kwargs))
            if stage < len(config.depths) - 1:
                self.merges.append(PatchMerging(features, **kwargs))
            out_channels.append(features)
        self.out_channels = tuple(out_channels)

    def __call__(
        self, image_bhwc: Float[Array, "b h w 3"], *, drop_path_key: Array | None = None
    ) -> tuple[Float[Array, "b _h _w _c"], ...]:
        """Normalised images to (res2, res3, res4, res5) at strides 4, 8, 16, 32.

        Args:
            image_bhwc: images of any size; padded with zeros to a multiple of 4.
            drop_path_key: randomness of stochastic depth, one typed key or one per image; None switches it off.
        """
        batch, height, width, _ = image_bhwc.shape
        image_bhwc = jnp.pad(image_bhwc, ((0, 0), (0, -height % 4), (0, -width % 4), (0, 0)))
        x = self.patch_norm(self.patch_embed(image_bhwc))
        keep = _drop_path_scales(drop_path_key, self.drop_path_rate, sum(self.depths), batch)
        outputs, done = [], 0
        for stage, blocks in enumerate(self.stages):
            # Blocks with and without shift alternate, so the pairs are equal.
            pairs = [nnx.List(blocks[i : i + 2]) for i in range(0, len(blocks), 2)]
            scales = [None if keep is None else keep[done + i : done + i + 2] for i in range(0, len(blocks), 2)]
            whole = len(blocks) // 2
            for part in (slice(whole), slice(whole, None)):
                if pairs[part]:
                    x, _ = layers.run_layers(_run_blocks, pairs[part], x, scales[part], remat=self.remat)
            done += len(blocks)
            outputs.append(self.norms[stage](x))
            if stage < len(self.merges):
                x = self.merges[stage](x)
        return tuple(outputs)


def _drop_path_scales(key, rate: float, blocks: int, batch: int) -> Float[Array, "l 2 b"] | None:
    """0 or 1/keep for both branches of every block and sample; the drop rate grows linearly from 0 to `rate`."""
    if key is None or rate == 0:
        return None
    keep = 1 - jnp.linspace(0, rate, blocks)[:, None, None]
    keys = key if key.ndim else jax.random.split(key, batch)
    drawn = jax.vmap(lambda key: jax.random.bernoulli(key, keep[..., 0], (blocks, 2)), out_axes=-1)(keys)
    return drawn / keep
