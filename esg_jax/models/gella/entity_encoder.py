"""GELLA's vision branch: a colormap and image features to entity embeddings and reconstructed masks (section 4.3)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from esg_jax.models.backbones import BackboneConfig, make_backbone
from esg_jax.models.backbones.mobilenet_v2 import MobileNetV2Config
from esg_jax.models.cropformer import CropFormerOutput
from esg_jax.models.cropformer.mask_decoder import MaskDecoder, MaskDecoderConfig, check_widths, image_memory
from esg_jax.models.cropformer.pixel_decoder import PixelDecoder, PixelDecoderConfig
from esg_jax.models.gella.resoblend import ResoBlend, ResoBlendConfig

# The colormap encoders are ImageNet models.
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@dataclasses.dataclass(frozen=True)
class EntityEncoderConfig:
    """Sizes of the vision branch.

    Attributes:
        colormap_encoder: the backbone that reads the colormap. MobileNetV2 (the paper's default) trains the scales and
            offsets of its batch normalisation: colours of entities are far from ImageNet's statistics.
        resoblend: wiring and width.
        pixel_decoder, mask_decoder: CropFormer's, class-agnostic.
        key_padding: queries of the mask decoder do not attend to the padding of the colormap. By default they may: the
            paper takes Mask2Former's decoder "without modifications", and that has no such mask; padding is black, as
            everything without an entity.
    """

    colormap_encoder: BackboneConfig = MobileNetV2Config(train_affine=True)
    resoblend: ResoBlendConfig = ResoBlendConfig()
    pixel_decoder: PixelDecoderConfig = PixelDecoderConfig()
    mask_decoder: MaskDecoderConfig = MaskDecoderConfig()
    key_padding: bool = False
    reconstructs: ClassVar[bool] = True  # entities are found again as masks of queries

    @property
    def num_queries(self) -> int:
        """Queries of the mask decoder."""
        return self.mask_decoder.num_queries

    @property
    def embed_dim(self) -> int:
        """Channels of E_vc."""
        return self.mask_decoder.hidden_dim

    def __post_init__(self):
        check_widths(self.pixel_decoder, self.mask_decoder)
        if self.mask_decoder.num_classes != 1:
            raise ValueError(f"mask_decoder.num_classes is {self.mask_decoder.num_classes}; entities have one class")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EntityOutput:
    """What the vision branch knows of the entities of a label map.

    Attributes:
        masks: entityness and masks of every query, as CropFormer returns them for one view. None where nothing is
            reconstructed (`entity_variants`): then embedding k is entity k, of label k + 1.
        embed: E_vc, the normed query states that both heads read, float32.
        present: which embeddings belong to an entity, where `masks` is None.
    """

    masks: CropFormerOutput | None
    embed: Float[Array, "b q c"]
    present: Bool[Array, "b q"] | None = None


class EntityEncoder(nnx.Module):
    """Colormap encoder, ResoBlend, pixel decoder and mask decoder."""

    def __init__(
        self,
        config: EntityEncoderConfig,
        image_channels: int,
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        remat: bool = False,
    ):
        """`image_channels`: of the image grid; `remat` recomputes blocks in the backward pass."""
        kwargs = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.config = config
        self.dtype = dtype
        self.colormap_encoder = make_backbone(config.colormap_encoder, remat=remat, **kwargs)
        self.resoblend = ResoBlend(config.resoblend, image_channels, self.colormap_encoder.out_channels, **kwargs)
        widths = (config.resoblend.dim,) * 4
        self.pixel_decoder = PixelDecoder(config.pixel_decoder, widths, remat=remat, **kwargs)
        self.mask_decoder = MaskDecoder(config.mask_decoder, remat=remat, **kwargs)

    def __call__(
        self,
        image_bghc: Float[Array, "b g1 g2 v"],
        colormap_bhwc: Float[Array, "b h w 3"],
        *,
        valid_bhw: Bool[Array, "b h w"] | None = None,
        drop_path_key: Array | None = None,
        all_predictions: bool = True,
    ) -> EntityOutput:
        """Finds the entities of a colormap again, and embeds them together with what the image shows there.

        Args:
            image_bghc: features of the image encoder; its grid covers the same square as the colormap.
            colormap_bhwc: RGB on the 0..255 scale, black where no entity is; sides are multiples of 32.
            valid_bhw: which pixels of the colormap are not padding; needed, and used, with `key_padding` only.
            drop_path_key: for Swin encoders, see `CropFormer`.
            all_predictions: keep those of every decoder layer, as training needs.

        Raises:
            ValueError: a side of the colormap is not a multiple of 32, or `valid_bhw` is missing.
        """
        batch, height, width, _ = colormap_bhwc.shape
        if height % 32 or width % 32:
            raise ValueError(f"the colormap is {height}x{width}; both sides must be multiples of 32")
        if not self.config.key_padding:
            valid_bhw = None
        elif valid_bhw is None:
            raise ValueError("key_padding is set, so the size of the content is needed (valid_bhw)")
        colors = (colormap_bhwc - np.array(IMAGENET_MEAN, np.float32)) / np.array(IMAGENET_STD, np.float32)
        features = self.colormap_encoder(colors.astype(self.dtype), drop_path_key=drop_path_key)
        mask_features, maps = self.pixel_decoder(self.resoblend(image_bghc.astype(self.dtype), features))
        mask_features = mask_features.astype(jnp.float32)
        output, states = self.mask_decoder(
            self.mask_decoder.queries(batch).astype(self.dtype),
            image_memory(mask_features, maps, valid_bhw),
            all_predictions=all_predictions,
        )
        embed = self.mask_decoder.norm(states).astype(jnp.float32)
        return EntityOutput(CropFormerOutput(output, None, mask_features[:, None]), embed)
