"""What GELLA's colormap is compared with: entity embeddings without colormap and reconstruction (ESG, Tables 19-20).

    BinaryPoolConfig     every binary mask through a MobileNetV2 of its own pass, pooled to one vector (Table 19)
    RoiAlignConfig       image features in the bounding box of every entity (Table 20, "RoI Align on Clip Feature")
    MaskAttentionConfig  masks as weights in the cross attention to the image (Table 20, "Adding/Multiply Mask in CA")

All take the image grid and the label map, and embed entity k (label k + 1) in row k: nothing has to be found again, so
there is neither a matching nor a reconstruction. The embeddings pass blocks of cross attention to the image followed by
self attention among the entities, which the paper describes for the first and the last; for RoI-Align it says no more
than that entities interact in the decoder. Widths, the feed-forward of each block, post-norm and the number of blocks
where Table 19 does not give it are choices.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from esg_jax.models import layers
from esg_jax.models.backbones.mobilenet_v2 import MobileNetV2, MobileNetV2Config
from esg_jax.models.gella.entity_encoder import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    EntityEncoder,
    EntityEncoderConfig,
    EntityOutput,
)
from esg_jax.models.positions import sine_position
from esg_jax.ops.regions import bounding_boxes, mask_weights, nearest_labels, roi_align

VALUES = ((0, 1), (-1, 1), (0, 255))
POOLINGS = ("avg", "conv14", "cls")
OPERATIONS = ("add", "multiply")
_GEOMETRY = 8


@dataclasses.dataclass(frozen=True)
class EntityBlocksConfig:
    """Sizes of the attention blocks.

    Attributes:
        dim: channels of the embeddings, E_vc.
        num_heads, ffn_dim: of every block.
        num_blocks: 1 to 5 in Table 19, of which 5 are best; 0 leaves the embeddings as they are.
        geometry: add an embedding of where each entity is and how large, which CropFormer's embeddings, from which the
            paper starts, know (a choice).
    """

    dim: int = 256
    num_heads: int = 8
    ffn_dim: int = 1024
    num_blocks: int = 5
    geometry: bool = False


class _Sized:
    """What all configurations can say of themselves."""

    blocks: EntityBlocksConfig
    reconstructs: ClassVar[bool] = False  # entity k has embedding k

    @property
    def embed_dim(self) -> int:
        """Channels of E_vc."""
        return self.blocks.dim


@dataclasses.dataclass(frozen=True)
class BinaryPoolConfig(_Sized):
    """Binary masks one by one; the defaults are the best row of Table 19.

    Attributes:
        num_queries: entities per image at most.
        blocks: attention after pooling.
        encoder: of the masks, the paper's MobileNetV2. Its statistics must be fixed: most of the `num_queries` masks of
            an image are blank, and so would be the statistics of a batch.
        mask_size: side in pixels to which masks are brought, a multiple of 32. 448 makes the last map 14 x 14, on which
            the paper's convolution has its size; the paper does not say.
        values: of a mask, outside and inside: (0, 1), (-1, 1) or (0, 255). The last is a picture and is normalised as
            one; the others are what the network sees (a choice).
        pooling: of the last map: "avg"; "conv14", one convolution with a 14 x 14 kernel; or "cls", a learned token that
            attends to the map once (a choice: a convolutional network has no CLS token of its own).
    """

    num_queries: int = 100
    blocks: EntityBlocksConfig = EntityBlocksConfig()
    encoder: MobileNetV2Config = MobileNetV2Config(train_affine=True)
    mask_size: int = 448
    values: tuple[int, int] = (0, 255)
    pooling: str = "avg"

    def __post_init__(self):
        object.__setattr__(self, "values", tuple(self.values))
        if self.values not in VALUES:
            raise ValueError(f"entities.values are {self.values}; choose one of {', '.join(map(str, VALUES))}")
        if self.pooling not in POOLINGS:
            raise ValueError(f"entities.pooling is {self.pooling!r}; choose one of {', '.join(POOLINGS)}")
        if self.mask_size % 32 or self.mask_size < 32:
            raise ValueError(f"entities.mask_size is {self.mask_size}; it must be a positive multiple of 32")
        if self.pooling == "conv14" and self.mask_size != 448:
            raise ValueError(f"entities.mask_size is {self.mask_size}; a 14 x 14 convolution needs 448")
        if self.encoder.batch_statistics:
            raise ValueError("entities.encoder.batch_statistics: masks one by one need fixed statistics")


@dataclasses.dataclass(frozen=True)
class RoiAlignConfig(_Sized):
    """Image features in bounding boxes (Table 20).

    Attributes:
        num_queries: entities per image at most.
        blocks: attention after pooling.
        bins: of a box, per axis, and samples: per bin and axis (choices, those of detectors). The bins of an entity
            are joined by one linear layer.
    """

    num_queries: int = 100
    blocks: EntityBlocksConfig = EntityBlocksConfig()
    bins: int = 7
    samples: int = 2


@dataclasses.dataclass(frozen=True)
class MaskAttentionConfig(_Sized):
    """Masks as weights in the cross attention (Table 20).

    The paper starts from CropFormer's embeddings of the entities, which masks from elsewhere do not have; here every
    entity starts from the mean of the image features under its mask.

    Attributes:
        num_queries: entities per image at most.
        blocks: the interleaved attention; at least one.
        operation: on the attention logits before the softmax: "add" the weights, or "multiply" by them.
        mask_gain: an image cell weighs this times the share of it that the mask covers. The paper gives no scale.
    """

    num_queries: int = 100
    blocks: EntityBlocksConfig = EntityBlocksConfig()
    operation: str = "add"
    mask_gain: float = 1.0

    def __post_init__(self):
        if self.operation not in OPERATIONS:
            raise ValueError(f"entities.operation is {self.operation!r}; choose one of {', '.join(OPERATIONS)}")
        if self.blocks.num_blocks < 1:
            raise ValueError("entities.blocks.num_blocks is 0; masks act in the blocks, so there must be one")


EntityVariantConfig = BinaryPoolConfig | RoiAlignConfig | MaskAttentionConfig

#: Name of a variant -> its configuration at the paper's sizes; "colormap" is GELLA itself.
VARIANTS: dict[str, EntityEncoderConfig | EntityVariantConfig] = {
    "colormap": EntityEncoderConfig(),
    "binary_pool": BinaryPoolConfig(),
    "roi_align": RoiAlignConfig(),
    "mask_ca_add": MaskAttentionConfig(operation="add"),
    "mask_ca_mul": MaskAttentionConfig(operation="multiply"),
}


class EntityBlock(nnx.Module):
    """Cross attention to the image, self attention among the entities, feed-forward; post-norm."""

    def __init__(self, config: EntityBlocksConfig, **kwargs):
        self.cross_attention = layers.MultiHeadAttention(config.dim, config.num_heads, **kwargs)
        self.self_attention = layers.MultiHeadAttention(config.dim, config.num_heads, **kwargs)
        self.norm1, self.norm2 = (layers.layer_norm(config.dim, **kwargs) for _ in range(2))
        self.ffn = layers.FeedForwardLayer(config.dim, config.ffn_dim, **kwargs)

    def __call__(self, x_bnc, image_bsc, position_sc, absent_bn, rescore: Callable[[Array], Array] | None):
        key = image_bsc + position_sc.astype(image_bsc.dtype)
        x_bnc = self.norm1(x_bnc + self.cross_attention(x_bnc, key, image_bsc, rescore=rescore))
        # Rows without entity are no keys; where an image has none at all, nobody reads the result.
        blocked = (absent_bn & ~jnp.all(absent_bn, axis=1, keepdims=True))[:, None]
        x_bnc = self.norm2(x_bnc + self.self_attention(x_bnc, x_bnc, x_bnc, blocked))
        return self.ffn(x_bnc)


class _Variant(nnx.Module):
    """Projection of the image, blocks and final norm; subclasses say where the embeddings come from."""

    def __init__(
        self,
        config: EntityVariantConfig,
        image_channels: int,
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        remat: bool = False,
    ):
        """`image_channels`: of the image grid; `remat` recomputes blocks in the backward pass."""
        kwargs = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        dim = config.blocks.dim
        self.config = config
        self.dtype = dtype
        self.remat = remat
        self.image_proj = nnx.Linear(image_channels, dim, kernel_init=layers.xavier_uniform, **kwargs)
        if config.blocks.geometry:
            self.geometry = layers.MLP((_GEOMETRY, dim, dim), **kwargs)
        self.blocks = nnx.List([EntityBlock(config.blocks, **kwargs) for _ in range(config.blocks.num_blocks)])
        self.norm = layers.layer_norm(dim, **kwargs)

    def __call__(self, image_bghc: Float[Array, "b g1 g2 v"], label_map_bhw: Int[Array, "b h w"]) -> EntityOutput:
        """Embeds the entities of label maps.

        Args:
            image_bghc: features of the image encoder; its grid covers the same square as the label map.
            label_map_bhw: 0 none, k + 1 entity k, at most `num_queries`.

        Returns:
            Embeddings (b, num_queries, dim), and which of them belong to an entity; no masks.
        """
        image = self.image_proj(image_bghc.astype(self.dtype))
        batch, *grid, dim = image.shape
        share, area = mask_weights(label_map_bhw, self.config.num_queries, tuple(grid))
        x = self.embed(image, label_map_bhw, share, area).astype(self.dtype)
        if self.config.blocks.geometry:
            x += self.geometry(_geometry(label_map_bhw, area).astype(self.dtype))
        position = sine_position(*grid, dim).reshape(-1, dim)
        tokens = image.reshape(batch, -1, dim)
        for block in self.blocks:
            x = layers.remat(self._run, self.remat)(block, x, tokens, position, share, area)
        return EntityOutput(None, self.norm(x).astype(jnp.float32), area > 0)

    def _run(self, block, x, tokens, position, share, area):
        return block(x, tokens, position, area == 0, self.rescore(share))

    @abc.abstractmethod
    def embed(self, image_bghc, label_map_bhw, share_bns, area_bn) -> Float[Array, "b n c"]:
        """The embeddings before the blocks."""

    def rescore(self, share_bns) -> Callable[[Array], Array] | None:
        """What happens to the logits (b, heads, n, s) of the cross attention."""
        return None


def _geometry(label_map_bhw, area_bn) -> Float[Array, "b n 8"]:
    """Corners of the bounding box, its sides, and the area as its root and its logarithm; about -1 to 1 all."""
    box = bounding_boxes(label_map_bhw, area_bn.shape[1])
    share = area_bn[..., None] / np.prod(label_map_bhw.shape[1:])
    return jnp.concatenate([box, box[..., 2:] - box[..., :2], jnp.sqrt(share), jnp.log(share + 1e-4) / 8], axis=-1)


class BinaryPool(_Variant):
    """See `BinaryPoolConfig`."""

    def __init__(self, config: BinaryPoolConfig, image_channels: int, *, rngs, remat: bool = False, **kwargs):
        super().__init__(config, image_channels, rngs=rngs, remat=remat, **kwargs)
        kwargs = dict(rngs=rngs, **kwargs)
        dim = config.blocks.dim
        self.mask_encoder = MobileNetV2(config.encoder, remat=remat, **kwargs)
        channels = self.mask_encoder.out_channels[-1]
        if config.pooling == "conv14":
            self.pool = nnx.Conv(channels, dim, (14, 14), padding="VALID", **kwargs)
            return
        self.mask_proj = nnx.Linear(channels, dim, kernel_init=layers.xavier_uniform, **kwargs)
        if config.pooling == "cls":
            self.token = nnx.Param(layers.normal_1(rngs.params(), (dim,), kwargs.get("param_dtype", jnp.float32)))
            self.attention = layers.MultiHeadAttention(dim, config.blocks.num_heads, **kwargs)

    def embed(self, image_bghc, label_map_bhw, share_bns, area_bn):
        labels = nearest_labels(label_map_bhw, self.config.mask_size)
        # One image at a time: its masks are a batch of their own, and often a large one.
        run = layers.remat(lambda labels_hw: self._pool(self._masks(labels_hw)), self.remat)
        return jax.lax.map(run, labels)

    def _masks(self, labels_hw) -> Float[Array, "n h w 3"]:
        """Masks as the encoder sees them, with three equal channels before normalisation."""
        low, high = self.config.values
        inside = labels_hw == jnp.arange(1, self.config.num_queries + 1)[:, None, None]
        masks = jnp.where(inside, float(high), float(low))[..., None]
        if high == 255:
            masks = (masks - np.array(IMAGENET_MEAN, np.float32)) / np.array(IMAGENET_STD, np.float32)
        return jnp.broadcast_to(masks, (*inside.shape, 3)).astype(self.dtype)

    def _pool(self, masks_nhw3) -> Float[Array, "n c"]:
        features = self.mask_encoder(masks_nhw3)[-1]
        if self.config.pooling == "conv14":
            return self.pool(features)[:, 0, 0]
        tokens = self.mask_proj(features)
        count, *grid, dim = tokens.shape
        tokens = tokens.reshape(count, -1, dim)
        if self.config.pooling == "avg":
            return jnp.mean(tokens, axis=1)
        query = jnp.broadcast_to(self.token[...].astype(tokens.dtype), (count, 1, dim))
        key = tokens + sine_position(*grid, dim).reshape(-1, dim).astype(tokens.dtype)
        return (query + self.attention(query, key, tokens))[:, 0]


class RoiAlign(_Variant):
    """See `RoiAlignConfig`."""

    def __init__(self, config: RoiAlignConfig, image_channels: int, *, rngs, remat: bool = False, **kwargs):
        super().__init__(config, image_channels, rngs=rngs, remat=remat, **kwargs)
        dim = config.blocks.dim
        self.join = nnx.Linear(config.bins**2 * dim, dim, kernel_init=layers.xavier_uniform, rngs=rngs, **kwargs)

    def embed(self, image_bghc, label_map_bhw, share_bns, area_bn):
        config = self.config
        pooled = roi_align(image_bghc, bounding_boxes(label_map_bhw, config.num_queries), config.bins, config.samples)
        return self.join(pooled.reshape(*pooled.shape[:2], -1))


class MaskAttention(_Variant):
    """See `MaskAttentionConfig`."""

    def embed(self, image_bghc, label_map_bhw, share_bns, area_bn):
        tokens = image_bghc.reshape(len(image_bghc), -1, image_bghc.shape[-1])
        pooled = jnp.einsum("bns,bsc->bnc", share_bns, tokens.astype(jnp.float32))
        return pooled / jnp.maximum(jnp.sum(share_bns, axis=-1, keepdims=True), 1e-6)

    def rescore(self, share_bns):
        weights = self.config.mask_gain * share_bns[:, None]
        return (
            (lambda logits: logits + weights) if self.config.operation == "add" else (lambda logits: logits * weights)
        )


# All that embed entities, by the class of their configuration.
ENTITY_ENCODERS = {
    EntityEncoderConfig: EntityEncoder,
    BinaryPoolConfig: BinaryPool,
    RoiAlignConfig: RoiAlign,
    MaskAttentionConfig: MaskAttention,
}
