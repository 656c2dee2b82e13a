"""CropFormer: entity masks from a full image and its high-resolution crops (ESG, section 4).

Without the association module this is Mask2Former: one view per image, any number of classes.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from esg_jax.models.backbones import BackboneConfig, make_backbone
from esg_jax.models.backbones.mobilenet_v2 import MobileNetV2Config
from esg_jax.models.backbones.resnet import ResNetConfig
from esg_jax.models.backbones.swin import SwinConfig
from esg_jax.models.cropformer.mask_decoder import (
    DecoderOutput,
    MaskDecoder,
    MaskDecoderConfig,
    Memory,
    check_widths,
    image_memory,
)
from esg_jax.models.cropformer.pixel_decoder import PixelDecoder, PixelDecoderConfig
from esg_jax.models.cropformer.view_association import AssociationConfig, ViewAssociation
from esg_jax.models.positions import view_sine_position


@dataclasses.dataclass(frozen=True)
class CropFormerConfig:
    """Everything that determines the parameters of a model.

    Attributes:
        backbone: which backbone, and its sizes.
        pixel_decoder, mask_decoder: sizes of the two decoders.
        association: sizes of the view association, or None for plain Mask2Former.
        pixel_mean, pixel_std: RGB normalisation on the 0..255 scale.
    """

    backbone: BackboneConfig
    pixel_decoder: PixelDecoderConfig = PixelDecoderConfig()
    mask_decoder: MaskDecoderConfig = MaskDecoderConfig()
    association: AssociationConfig | None = AssociationConfig()
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)

    def __post_init__(self):
        check_widths(self.pixel_decoder, self.mask_decoder)

    @classmethod
    def swin_tiny(cls) -> "CropFormerConfig":
        """CropFormer Swin-T of the paper: 48.98 M parameters."""
        return cls(backbone=SwinConfig.tiny())

    @classmethod
    def swin_large(cls, window_size: int = 7) -> "CropFormerConfig":
        """CropFormer Swin-L of the paper: 216.83 M parameters."""
        return cls(backbone=SwinConfig.large(window_size=window_size))

    @classmethod
    def resnet50(cls) -> "CropFormerConfig":
        """CropFormer with a ResNet-50 backbone."""
        return cls(backbone=ResNetConfig.resnet50())

    @classmethod
    def mobilenet_v2(cls) -> "CropFormerConfig":
        """A small model for laptops: MobileNetV2, and decoders of half the width and a third of the depth."""
        return cls(
            backbone=MobileNetV2Config(),
            pixel_decoder=PixelDecoderConfig(conv_dim=128, mask_dim=128, num_layers=3, num_heads=4, ffn_dim=512),
            mask_decoder=MaskDecoderConfig(
                hidden_dim=128, mask_dim=128, num_heads=4, ffn_dim=512, num_layers=3, num_queries=50
            ),
            association=AssociationConfig(num_heads=4, ffn_dim=512),
        )

    def without_views(self, num_classes: int = 1, num_queries: int | None = None) -> "CropFormerConfig":
        """The plain Mask2Former with the same backbone and decoders."""
        decoder = dataclasses.replace(
            self.mask_decoder, num_classes=num_classes, num_queries=num_queries or self.mask_decoder.num_queries
        )
        return dataclasses.replace(self, mask_decoder=decoder, association=None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CropFormerOutput:
    """Predictions per view and, with an association module, per image.

    Attributes:
        image: image level; item b*T + t is view t of image b.
        batch: batch level, one item per image, or None without association.
        mask_features: stride-4 features that mask embeddings are multiplied with.
    """

    image: DecoderOutput
    batch: DecoderOutput | None
    mask_features: Float[Array, "b t h w c"]

    def image_mask_logits(self, prediction: int = -1) -> Float[Array, "b t q h w"]:
        """Stride-4 mask logits of every view by its own queries."""
        batch, views = self.mask_features.shape[:2]
        embed = self.image.mask_embed[prediction].reshape(batch, views, *self.image.mask_embed.shape[2:])
        return jnp.einsum("btqc,bthwc->btqhw", embed, self.mask_features)

    def batch_mask_logits(self, prediction: int = -1) -> Float[Array, "b q t h w"]:
        """Stride-4 mask logits of the batch-level queries in every view."""
        if self.batch is None:
            raise ValueError("the model has no association module, so there is no batch level")
        return jnp.einsum("bqc,bthwc->bqthw", self.batch.mask_embed[prediction], self.mask_features)


class CropFormer(nnx.Module):
    """Backbone, pixel decoder, and one query decoder used at the image and at the batch level."""

    def __init__(
        self,
        config: CropFormerConfig,
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        remat: bool = False,
    ):
        """Creates the parameters.

        Args:
            config: sizes.
            rngs: needs the `params` stream.
            dtype: of the computation; mask features, heads and sampling positions stay float32.
            param_dtype: of the parameters.
            remat: recompute every block in the backward pass, to save memory.
        """
        kwargs = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.config = config
        self.dtype = dtype
        self.backbone = make_backbone(config.backbone, remat=remat, **kwargs)
        self.pixel_decoder = PixelDecoder(config.pixel_decoder, self.backbone.out_channels, remat=remat, **kwargs)
        self.mask_decoder = MaskDecoder(config.mask_decoder, remat=remat, **kwargs)
        self.association = (
            ViewAssociation(config.association, config.mask_decoder.hidden_dim, **kwargs)
            if config.association
            else None
        )

    def __call__(
        self,
        image_bthwc: Num[Array, "b t h w 3"],
        size_bt2: Int[Array, "b t 2"],
        *,
        drop_path_key: Array | None = None,
        all_predictions: bool = True,
    ) -> CropFormerOutput:
        """Predicts entities.

        Args:
            image_bthwc: RGB views on the 0..255 scale, padded at the bottom and right to one size, a multiple of 32.
                View 0 is the full image.
            size_bt2: (height, width) of every view before padding, in pixels.
            drop_path_key: randomness of stochastic depth, one typed key or one per view (b*t); None switches it off
                (inference).
            all_predictions: keep the predictions of every layer, as training needs.

        Raises:
            ValueError: height or width is not a multiple of 32.
        """
        batch, views, height, width, _ = image_bthwc.shape
        if height % 32 or width % 32:
            raise ValueError(f"views are padded to {height}x{width}; both sides must be multiples of 32")
        image = self.normalize(image_bthwc, size_bt2).astype(self.dtype)
        features = self.backbone(image.reshape(-1, height, width, 3), drop_path_key=drop_path_key)
        mask_features, maps = self.pixel_decoder(features)
        mask_features = mask_features.astype(jnp.float32)

        memory = image_memory(mask_features, maps)
        output, states = self.mask_decoder(
            self.mask_decoder.queries(batch * views).astype(self.dtype),
            memory,
            all_predictions=all_predictions,
        )
        batch_output = None
        if self.association is not None:
            states = states.reshape(batch, views, *states.shape[1:])
            queries = self.association(states, self.mask_decoder.query_embed[...].astype(states.dtype))
            joint = [
                Memory(
                    tokens=_join_views(level.tokens, batch),
                    position=view_sine_position(views, *tokens.shape[1:]).reshape(-1, tokens.shape[-1]),
                    mask_features=_join_views(level.mask_features, batch),
                )
                for level, tokens in zip(memory, maps, strict=True)
            ]
            batch_output, _ = self.mask_decoder(queries, joint, all_predictions=all_predictions)
        mask_features = mask_features.reshape(batch, views, *mask_features.shape[1:])
        return CropFormerOutput(output, batch_output, mask_features)

    def normalize(
        self, image_bthwc: Num[Array, "b t h w 3"], size_bt2: Int[Array, "b t 2"]
    ) -> Float[Array, "b t h w 3"]:
        """Subtracts the mean, divides by the deviation, then sets the padding to zero."""
        mean = np.array(self.config.pixel_mean, np.float32)
        std = np.array(self.config.pixel_std, np.float32)
        image = (image_bthwc.astype(jnp.float32) - mean) / std
        rows = jnp.arange(image.shape[2])[:, None, None] < size_bt2[..., 0, None, None, None]
        columns = jnp.arange(image.shape[3])[:, None] < size_bt2[..., 1, None, None, None]
        return jnp.where(rows & columns, image, 0.0)


def _join_views(x: Float[Array, "bt s c"], batch: int) -> Float[Array, "b ts c"]:
    """Tokens of all views of an image in one row, view-major."""
    return x.reshape(batch, -1, x.shape[-1])
