"""CLIP's image and text transformers (Radford et al. 2021), as LLaVA uses them.

Both are pre-norm transformers with quick-GELU. Their blocks are stacked: every weight has a leading layer axis, and one
`jax.lax.scan` runs them. The image side gives the tokens of an inner layer (LLaVA-1.5: the last but one), and the
blocks behind it are not computed.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from esg_jax.models import layers

# Of images with values 0..1, RGB.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_normal = nnx.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig:
    """Sizes of the image transformer; the defaults are ViT-L/14's.

    Attributes:
        image_size: side of the square image, a multiple of `patch_size`.
        patch_size: side of a patch.
        width: channels.
        num_layers, num_heads: blocks, and attention heads in each.
        ffn_dim: hidden channels of the perceptrons.
    """

    image_size: int = 336
    patch_size: int = 14
    width: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    ffn_dim: int = 4096

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size ({self.image_size}) must be a multiple of patch_size ({self.patch_size})")

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size

    @classmethod
    def large_336(cls) -> "ClipVisionConfig":
        """ViT-L/14 for 336 pixels: 24 x 24 tokens, 303.5 M parameters."""
        return cls()

    @classmethod
    def large_224(cls) -> "ClipVisionConfig":
        """ViT-L/14 for 224 pixels: 16 x 16 tokens."""
        return cls(image_size=224)

    @classmethod
    def tiny(cls) -> "ClipVisionConfig":
        """For tests: 4 x 4 tokens."""
        return cls(image_size=32, patch_size=8, width=32, num_layers=3, num_heads=4, ffn_dim=48)


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
    """Sizes of the text transformer; the defaults are those beside ViT-L/14.

    Attributes:
        vocab_size: number of token ids.
        max_length: longest text in tokens.
        width, num_layers, num_heads, ffn_dim: as for the image.
        eos_id: the token whose state stands for the text.
        projection_dim: channels of the embedding shared with images; None: without the projection to it.
    """

    vocab_size: int = 49408
    max_length: int = 77
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    ffn_dim: int = 3072
    eos_id: int = 49407
    projection_dim: int | None = 768


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Sizes of both transformers; `text.projection_dim` must be set."""

    vision: ClipVisionConfig = ClipVisionConfig()
    text: ClipTextConfig = ClipTextConfig()

    def __post_init__(self):
        if self.text.projection_dim is None:
            raise ValueError("text.projection_dim is None, but images and texts need a common embedding")


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x * sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


class ClipBlock(nnx.Module):
    """Pre-norm residual attention and perceptron."""

    def __init__(self, width: int, num_heads: int, ffn_dim: int, *, rngs: nnx.Rngs, dtype, param_dtype):
        kwargs = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.attention_norm = layers.layer_norm(width, **kwargs)
        self.attention = layers.MultiHeadAttention(width, num_heads, **kwargs)
        self.mlp_norm = layers.layer_norm(width, **kwargs)
        self.fc1 = nnx.Linear(width, ffn_dim, kernel_init=_normal, **kwargs)
        self.fc2 = nnx.Linear(ffn_dim, width, kernel_init=_normal, **kwargs)

    def __call__(
        self, x_btc: Float[Array, "b t c"], blocked_1ts: Bool[Array, "1 t s"] | None = None
    ) -> Float[Array, "b t c"]:
        normed = self.attention_norm(x_btc)
        x_btc = x_btc + self.attention(normed, normed, normed, blocked_1ts)
        return x_btc + self.fc2(quick_gelu(self.fc1(self.mlp_norm(x_btc))))


def _stacked_blocks(config: ClipVisionConfig | ClipTextConfig, rngs: nnx.Rngs, **kwargs) -> ClipBlock:
    """All blocks of a transformer as one module whose weights have a leading layer axis."""

    @nnx.split_rngs(splits=config.num_layers)
    @nnx.vmap(axis_size=config.num_layers)
    def create(rngs):
        return ClipBlock(config.width, config.num_heads, config.ffn_dim, rngs=rngs, **kwargs)

    return create(rngs)


def _run_blocks(blocks: ClipBlock, x_btc, blocked_1ts, remat: bool, start: int = 0, stop: int | None = None):
    """The tokens after blocks start..stop-1."""

    def body(x_btc, block):
        return layers.remat(ClipBlock.__call__, remat)(block, x_btc, blocked_1ts), None

    return jax.lax.scan(body, x_btc, jax.tree.map(lambda x: x[start:stop], blocks))[0]


class ClipVision(nnx.Module):
    """Image transformer."""

    def __init__(
        self,
        config: ClipVisionConfig,
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        remat: bool = False,
    ):
        """`remat` recomputes every block in the backward pass."""
        self.config = config
        self.dtype = dtype
        self.remat = remat
        kwargs = dict(dtype=dtype, param_dtype=param_dtype)
        patch = (config.patch_size, config.patch_size)
        self.patch_embed = nnx.Conv(
            *(3, config.width, patch),
            strides=patch,
            padding="VALID",
            use_bias=False,
            kernel_init=_normal,
            rngs=rngs,
            **kwargs,
        )
        self.class_embed = nnx.Param(_normal(rngs.params(), (config.width,), param_dtype))
        self.position_embed = nnx.Param(_normal(rngs.params(), (1 + config.grid**2, config.width), param_dtype))
        self.pre_norm = layers.layer_norm(config.width, rngs=rngs, **kwargs)
        self.layers = _stacked_blocks(config, rngs, **kwargs)
        # Only `pooled` uses it.
        self.post_norm = layers.layer_norm(config.width, rngs=rngs, **kwargs)

    def hidden_states(
        self, image_bhwc: Float[Array, "b h w 3"], select_layers: Sequence[int]
    ) -> tuple[Float[Array, "b t c"], ...]:
        """Tokens, the class token first, after each of the named layers.

        Args:
            image_bhwc: RGB, normalised with `CLIP_MEAN` and `CLIP_STD`.
            select_layers: 0: before the blocks, n: after the n-th; negative numbers count from the end (-1: after the
                last block). Blocks behind the last one named are not computed.

        Raises:
            ValueError: the image does not have the configured size, or there is no such layer.
        """
        config = self.config
        if image_bhwc.shape[1:] != (config.image_size, config.image_size, 3):
            raise ValueError(
                f"CLIP takes images of shape {(config.image_size, config.image_size, 3)}, not {image_bhwc.shape[1:]}"
            )
        count = config.num_layers
        stops = [layer + count + 1 if layer < 0 else layer for layer in select_layers]
        if not all(0 <= stop <= count for stop in stops):
            raise ValueError(f"select_layers {tuple(select_layers)} must be within [{-count - 1}, {count}]")
        patches_bgwc = self.patch_embed(image_bhwc.astype(self.dtype))
        batch = patches_bgwc.shape[0]
        token_b1c = jnp.broadcast_to(self.class_embed[...].astype(self.dtype), (batch, 1, config.width))
        x_btc = jnp.concatenate([token_b1c, patches_bgwc.reshape(batch, -1, config.width)], axis=1)
        x_btc = self.pre_norm(x_btc + self.position_embed[...].astype(self.dtype))
        states, start = {}, 0
        for stop in sorted(set(stops)):
            x_btc = _run_blocks(self.layers, x_btc, None, self.remat, start, stop)
            states[stop], start = x_btc, stop
        return tuple(states[stop] for stop in stops)

    def __call__(self, image_bhwc: Float[Array, "b h w 3"], select_layer: int = -2) -> Float[Array, "b g g c"]:
        """Patch tokens after one layer, without norm, on their grid; arguments and errors as for `hidden_states`."""
        (tokens_btc,) = self.hidden_states(image_bhwc, (select_layer,))
        batch, _, channels = tokens_btc.shape
        return tokens_btc[:, 1:].reshape(batch, self.config.grid, self.config.grid, channels)

    def pooled(self, image_bhwc: Float[Array, "b h w 3"]) -> Float[Array, "b c"]:
        """The normed class token after the last block."""
        return self.post_norm(self.hidden_states(image_bhwc, (-1,))[0][:, 0])


class ClipText(nnx.Module):
    """Causal text transformer."""

    def __init__(
        self, config: ClipTextConfig, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32, remat: bool = False
    ):
        """`remat` recomputes every block in the backward pass."""
        self.config = config
        self.dtype = dtype
        self.remat = remat
        kwargs = dict(dtype=dtype, param_dtype=param_dtype)
        self.token_embed = nnx.Embed(config.vocab_size, config.width, embedding_init=_normal, rngs=rngs, **kwargs)
        self.position_embed = nnx.Param(_normal(rngs.params(), (config.max_length, config.width), param_dtype))
        self.layers = _stacked_blocks(config, rngs, **kwargs)
        self.final_norm = layers.layer_norm(config.width, rngs=rngs, **kwargs)
        if config.projection_dim is not None:
            self.projection = nnx.Linear(
                config.width, config.projection_dim, use_bias=False, kernel_init=_normal, rngs=rngs, **kwargs
            )

    def __call__(self, ids_bt: Int[Array, "b t"]) -> tuple[Float[Array, "b t c"], Float[Array, "b d"]]:
        """Normed states of all tokens, and the state at the first `eos_id`, projected if there is a projection.

        Padding behind the end of a text changes nothing: tokens see only those before them.

        Raises:
            ValueError: more tokens than positions.
        """
        batch, length = ids_bt.shape
        if length > self.config.max_length:
            raise ValueError(f"{length} tokens are more than CLIP's {self.config.max_length} positions")
        x_btc = self.token_embed(ids_bt) + self.position_embed[:length].astype(self.dtype)
        blocked_1ts = ~jnp.tril(jnp.ones((1, length, length), bool))
        x_btc = self.final_norm(_run_blocks(self.layers, x_btc, blocked_1ts, self.remat))
        pooled_bc = x_btc[jnp.arange(batch), jnp.argmax(ids_bt == self.config.eos_id, axis=1)]
        return x_btc, pooled_bc if self.config.projection_dim is None else self.projection(pooled_bc)


class Clip(nnx.Module):
    """Both transformers and the embedding they share."""

    def __init__(
        self, config: ClipConfig, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32, remat: bool = False
    ):
        self.config = config
        kwargs = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.vision = ClipVision(config.vision, remat=remat, **kwargs)
        self.text = ClipText(config.text, remat=remat, **kwargs)
        self.visual_projection = nnx.Linear(
            config.vision.width, config.text.projection_dim, use_bias=False, kernel_init=_normal, **kwargs
        )
        # Logarithm of the inverse temperature; 1 / 0.07 at the start (section 2.5).
        self.logit_scale = nnx.Param(jnp.asarray(2.6592, param_dtype))

    def __call__(self, image_bhwc: Float[Array, "b h w 3"], ids_nt: Int[Array, "n t"]) -> Float[Array, "b n"]:
        """Scaled cosine similarity of every image with every text, float32."""
        image_bd = _unit(self.visual_projection(self.vision.pooled(image_bhwc)))
        text_nd = _unit(self.text(ids_nt)[1])
        return jnp.exp(self.logit_scale[...].astype(jnp.float32)) * image_bd @ text_nd.T


def _unit(x_nd: Float[Array, "n d"]) -> Float[Array, "n d"]:
    x_nd = x_nd.astype(jnp.float32)
    return x_nd / jnp.linalg.norm(x_nd, axis=-1, keepdims=True)
