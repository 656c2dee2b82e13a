"""GELLA: grounds the nouns of a text in given entity masks (ESG, sections 4.2-4.3).

Two branches meet in the association module. The vision branch sees the masks as a colormap together with the image and
gives an embedding per entity; the language branch sees the image and the text and gives one per noun, the hidden state
of the `<SEG>` token behind it. Masks may come from any segmenter.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from esg_jax.models.backbones import BackboneConfig, backbone_configs, make_backbone
from esg_jax.models.backbones.mobilenet_v2 import MobileNetV2Config
from esg_jax.models.gella.colormap import ColormapConfig, colorize
from esg_jax.models.gella.entity_encoder import IMAGENET_MEAN, IMAGENET_STD, EntityEncoderConfig, EntityOutput
from esg_jax.models.gella.entity_variants import ENTITY_ENCODERS, BinaryPoolConfig, MaskAttentionConfig, RoiAlignConfig
from esg_jax.models.gella.grounding_association import GroundingAssociation, GroundingAssociationConfig
from esg_jax.models.language.clip import CLIP_MEAN, CLIP_STD, ClipVision, ClipVisionConfig
from esg_jax.models.language.llama import Llama, LlamaConfig
from esg_jax.models.language.llava import Projector, insert_image
from esg_jax.models.language.lora import Lora, LoraConfig
from esg_jax.ops.padding import check_pad_position, content_mask


@dataclasses.dataclass(frozen=True)
class GellaConfig:
    """Everything that determines the parameters of a model.

    Attributes:
        entities: the vision branch: the colormap, or one of the alternatives of Tables 19-20 (`entity_variants`).
        vision: the image encoder. CLIP as in the paper, or an ImageNet backbone, whose stride-32 map stands in for
            CLIP's grid where no CLIP weights are to be had.
        image_size: side of the square image in pixels; CLIP's own, or a multiple of 32 for a backbone.
        vision_stride: of a backbone's grid: 32, its last map; or 16, the map before it with the last one at its side.
        token_pooling: side of the squares of grid cells that are averaged to one image token of the language model.
        select_layer: of CLIP: -2 as LLaVA-1.5, whose projector was trained on it; the paper's text says the last.
        colormap: size and colours.
        pad_position: where image and colormap are padded to squares: "bottom_right" as CropFormer's views, or "center"
            (on all sides) as LLaVA's images. The paper does not say.
        llm: the language model, or None for the vision branch alone (reconstruction, Table 16).
        projector: "mlp2x_gelu" (LLaVA-1.5, from which GELLA starts) or "linear" (the paper's text).
        association: of nouns and entities.
        image_id, seg_id: ids of the image placeholder and of `<SEG>`.
        seg_hidden: a noun's embedding is the state "at" its `<SEG>` token, or at the token that "predict"s it.
        noun_blocks: blocks of the language model after which a noun's state is taken (through the final norm); None:
            all, as in the paper. A frozen model's last states are about the next word; the noun is clearer earlier,
            and nothing else has to be computed. Such a model cannot list nouns by itself.
        lora: low-rank adapters on the language model, or None.
    """

    entities: EntityEncoderConfig | BinaryPoolConfig | RoiAlignConfig | MaskAttentionConfig = EntityEncoderConfig()
    vision: ClipVisionConfig | BackboneConfig = ClipVisionConfig()
    image_size: int = 336
    vision_stride: int = 32
    token_pooling: int = 1
    select_layer: int = -2
    colormap: ColormapConfig = ColormapConfig()
    pad_position: str = "bottom_right"
    llm: LlamaConfig | None = LlamaConfig()
    projector: str = "mlp2x_gelu"
    association: GroundingAssociationConfig = GroundingAssociationConfig()
    image_id: int = 32000
    seg_id: int = 32002
    seg_hidden: str = "at"
    noun_blocks: int | None = None
    lora: LoraConfig | None = None

    def __post_init__(self):
        if not isinstance(self.vision, (ClipVisionConfig, *backbone_configs())):
            kind = type(self.vision).__name__
            raise ValueError(f"vision is a {kind}; choose a ClipVisionConfig or the configuration of a backbone")
        if self.clip and self.vision.image_size != self.image_size:
            raise ValueError(
                f"image_size is {self.image_size}, vision.image_size {self.vision.image_size}; make them equal"
            )
        if not self.clip and self.image_size % 32:
            raise ValueError(f"image_size is {self.image_size}; a backbone needs a multiple of 32")
        if self.vision_stride not in (16, 32):
            raise ValueError(f"vision_stride is {self.vision_stride}; choose 16 or 32")
        if self.clip and self.vision_stride != 32:
            raise ValueError(f"vision_stride is {self.vision_stride}; only backbones have a choice")
        if self.token_pooling < 1 or self.grid % self.token_pooling:
            raise ValueError(f"token_pooling is {self.token_pooling}; it must divide the grid of {self.grid}")
        check_pad_position(self.pad_position, "pad_position")
        if self.seg_hidden not in ("at", "predict"):
            raise ValueError(f"seg_hidden is {self.seg_hidden!r}; choose at or predict")
        if self.lora is not None and self.llm is None:
            raise ValueError("lora is set, but there is no llm to adapt")
        if self.noun_blocks is not None and not (self.llm and 1 <= self.noun_blocks <= self.llm.num_layers):
            raise ValueError(f"noun_blocks is {self.noun_blocks}; choose 1 to the number of blocks of llm, or None")
        if self.llm is None and not self.reconstructs:
            raise ValueError(
                f"{type(self.entities).__name__} reconstructs no masks, so without llm there is nothing to do"
            )

    @property
    def clip(self) -> bool:
        """Whether the image encoder is CLIP; otherwise it is a backbone."""
        return isinstance(self.vision, ClipVisionConfig)

    @property
    def grid(self) -> int:
        """Side of the image encoder's grid, Zv."""
        return self.vision.grid if self.clip else self.image_size // self.vision_stride

    @property
    def num_image_tokens(self) -> int:
        """Positions that the image takes in the text."""
        return (self.grid // self.token_pooling) ** 2

    @property
    def num_queries(self) -> int:
        """Embeddings in E_vc (queries of the mask decoder): the largest number of entities that can be told apart."""
        return self.entities.num_queries

    @property
    def reconstructs(self) -> bool:
        """Whether entities are found again as masks of queries; otherwise entity k has embedding k."""
        return self.entities.reconstructs

    @classmethod
    def vicuna_7b(cls, lora: LoraConfig | None = None) -> "GellaConfig":
        """The paper's model: CLIP ViT-L/14 at 336 pixels, Vicuna-7B, MobileNetV2 for colormaps.

        Colormaps are far from ImageNet's statistics, so the MobileNetV2 follows theirs (the paper does not say).
        """
        encoder = MobileNetV2Config(train_affine=True, batch_statistics=True)
        return cls(entities=EntityEncoderConfig(encoder), lora=lora)

    @classmethod
    def vicuna_13b(cls, lora: LoraConfig | None = None) -> "GellaConfig":
        """The same with Vicuna-13B."""
        return dataclasses.replace(cls.vicuna_7b(lora), llm=LlamaConfig.llama_13b())


class VisionBranch(nnx.Module):
    """Image encoder and entity encoder: all that sees pixels. Trained alone, it reconstructs masks (Table 16)."""

    def __init__(
        self, config: GellaConfig, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32, remat: bool = False
    ):
        kwargs = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype, remat=remat)
        self.config = config
        self.dtype = dtype
        if config.clip:
            self.image_encoder = ClipVision(config.vision, **kwargs)
            self.image_channels = config.vision.width
        else:
            self.image_encoder = make_backbone(config.vision, **kwargs)
            self.image_channels = sum(self.image_encoder.out_channels[-2 if config.vision_stride == 16 else -1 :])
        self.entity_encoder = ENTITY_ENCODERS[type(config.entities)](config.entities, self.image_channels, **kwargs)

    def vision_tokens(self, image_bhwc: Num[Array, "b s s 3"], size_b2: Int[Array, "b 2"]) -> Float[Array, "b g g c"]:
        """Zv: the image encoder's grid.

        Args:
            image_bhwc: RGB on the 0..255 scale, longer side `image_size`, padded at `pad_position` with anything.
            size_b2: (height, width) before padding, in pixels.

        Raises:
            ValueError: the image has another size than the configuration says.
        """
        side = self.config.image_size
        if image_bhwc.shape[1:] != (side, side, 3):
            raise ValueError(
                f"images must have shape {(side, side, 3)} (config.image_size), not {image_bhwc.shape[1:]}"
            )
        mean, std = (
            (255 * np.array(CLIP_MEAN, np.float32), 255 * np.array(CLIP_STD, np.float32))
            if self.config.clip
            else (np.array(IMAGENET_MEAN, np.float32), np.array(IMAGENET_STD, np.float32))
        )
        image = (image_bhwc.astype(jnp.float32) - mean) / std
        # Zero after normalisation is the mean colour, with which LLaVA-1.5 pads.
        content = content_mask(side, side, size_b2, self.config.pad_position)
        image = jnp.where(content[..., None], image, 0.0).astype(self.dtype)
        if self.config.clip:
            return self.image_encoder(image, self.config.select_layer)
        *_, fine, coarse = self.image_encoder(image)
        if self.config.vision_stride == 32:
            return coarse
        return jnp.concatenate([fine, jnp.repeat(jnp.repeat(coarse, 2, axis=1), 2, axis=2)], axis=-1)

    def entities(
        self,
        vision_bghc: Float[Array, "b g g c"],
        label_map_bhw: Int[Array, "b h w"],
        keys_b: Array,
        *,
        size_b2: Int[Array, "b 2"] | None = None,
        drop_path_key: Array | None = None,
        all_predictions: bool = False,
    ) -> EntityOutput:
        """E_vc and the reconstructed masks of the entities in label maps.

        Args:
            vision_bghc: from `vision_tokens`.
            label_map_bhw: 0 none, 1.. entities; of any sides that are multiples of 32, usually `colormap.size`.
            keys_b: a typed key per image, for the colours.
            size_b2: (height, width) of the label maps before padding; only `entities.key_padding` needs it.
            drop_path_key: see `EntityEncoder`.
            all_predictions: keep those of every decoder layer, as training needs.

        The alternatives to the colormap use the first two arguments only.
        """
        if not self.config.reconstructs:
            return self.entity_encoder(vision_bghc, label_map_bhw)
        colormap = colorize(label_map_bhw, keys_b, self.config.num_queries, self.config.colormap)
        valid = None if size_b2 is None else content_mask(*label_map_bhw.shape[1:], size_b2, self.config.pad_position)
        return self.entity_encoder(
            vision_bghc, colormap, valid_bhw=valid, drop_path_key=drop_path_key, all_predictions=all_predictions
        )


class Gella(nnx.Module):
    """Vision branch, language branch, association."""

    def __init__(
        self, config: GellaConfig, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32, remat: bool = False
    ):
        """Creates the parameters; `remat` recomputes every block in the backward pass."""
        kwargs = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.config = config
        self.dtype = dtype
        self.visual = VisionBranch(config, remat=remat, **kwargs)
        if config.llm is None:
            return
        self.projector = Projector(config.projector, self.visual.image_channels, config.llm.width, **kwargs)
        self.llm = Llama(config.llm, remat=remat, **kwargs)
        self.association = GroundingAssociation(
            config.association, config.llm.width, config.entities.embed_dim, rngs=rngs, param_dtype=param_dtype
        )
        self.lora = None if config.lora is None else Lora(config.lora, config.llm, **kwargs)

    def vision_tokens(self, image_bhwc: Num[Array, "b s s 3"], size_b2: Int[Array, "b 2"]) -> Float[Array, "b g g c"]:
        """See `VisionBranch.vision_tokens`."""
        return self.visual.vision_tokens(image_bhwc, size_b2)

    def entities(
        self, vision_bghc: Float[Array, "b g g c"], label_map_bhw: Int[Array, "b h w"], keys_b: Array, **kwargs
    ) -> EntityOutput:
        """See `VisionBranch.entities`."""
        return self.visual.entities(vision_bghc, label_map_bhw, keys_b, **kwargs)

    def embed_text(self, vision_bghc: Float[Array, "b g g c"], ids_bt: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """The language model's input: embedded tokens, with the projected image where `image_id` stands."""
        pool, channels = self.config.token_pooling, vision_bghc.shape[-1]
        if pool > 1:
            side = self.config.grid // pool
            vision_bghc = jnp.mean(vision_bghc.reshape(-1, side, pool, side, pool, channels), axis=(2, 4))
        image = self.projector(vision_bghc.reshape(len(vision_bghc), -1, channels))
        return insert_image(self.llm.embed(ids_bt), ids_bt, self.config.image_id, image)

    def text(
        self,
        vision_bghc: Float[Array, "b g g c"],
        ids_bt: Int[Array, "b t"],
        *,
        num_blocks: int | None = None,
        lora_key: Array | None = None,
        pin: Callable[[Array], Array] | None = None,
    ) -> Float[Array, "b t d"]:
        """Hidden states after the final norm.

        Args:
            vision_bghc: from `vision_tokens`.
            ids_bt: tokens.
            num_blocks: run only the first blocks; for states of nouns `config.noun_blocks`.
            lora_key: switches the adapters' dropout on.
            pin: see `Llama.__call__`.
        """
        embedded = self.embed_text(vision_bghc, ids_bt)
        hidden, _ = self.llm(embedded, num_blocks=num_blocks, lora=self.lora, lora_key=lora_key, pin=pin)
        return hidden

    def noun_states(self, hidden_btd: Float[Array, "b t d"], seg_pos_bv: Int[Array, "b v"]) -> Float[Array, "b v d"]:
        """E_vl: the states of the nouns whose `<SEG>` tokens are at these positions, of `text(..., noun_blocks)`."""
        position = seg_pos_bv if self.config.seg_hidden == "at" else jnp.maximum(seg_pos_bv - 1, 0)
        return jnp.take_along_axis(hidden_btd, position[..., None], axis=1)

    def associate(self, nouns_bvd: Float[Array, "b v d"], entities_bqc: Float[Array, "b q c"]) -> Float[Array, "b v q"]:
        """A of eq. 16: logits of "noun v is the entity of query q", float32."""
        return self.association(nouns_bvd, entities_bqc)
