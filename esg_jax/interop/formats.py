"""Checkpoint formats: recognised by their names, sized by their shapes."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from esg_jax.interop import backbone_tables, language_config, language_tables
from esg_jax.interop.convert import ConversionError, plan
from esg_jax.interop.cropformer_tables import reference_table, transformers_table
from esg_jax.interop.gella_tables import GELLA
from esg_jax.interop.readers import CheckpointReader
from esg_jax.interop.rules import Table, fill
from esg_jax.interop.transformers_config import read_mask2former_config
from esg_jax.models.backbones.mobilenet_v2 import MobileNetV2Config
from esg_jax.models.backbones.resnet import ResNetConfig
from esg_jax.models.backbones.swin import SwinConfig
from esg_jax.models.clip import Clip, ClipText, ClipVision
from esg_jax.models.cropformer import CropFormer, CropFormerConfig
from esg_jax.models.gella import Gella
from esg_jax.models.llama import Llama
from esg_jax.models.llava import Llava
from esg_jax.models.mask_decoder import MaskDecoderConfig
from esg_jax.models.pixel_decoder import PixelDecoderConfig
from esg_jax.models.view_association import AssociationConfig

# Shapes do not show the number of attention heads; the reference always uses this many.
_HEADS = 8


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of checkpoint.

    Attributes:
        name: for messages and the command line.
        marks: patterns; a checkpoint in which each is found somewhere has this format.
        table: the name table for reading.
        backbone: configuration class, of a backbone.
        model: class, of a whole model.
        infer: of a whole model, its configuration from the shapes of our parameters (and the number of heads).
        read_config: of a whole model, its configuration from the `config.json` beside the file.
        absent: pattern of our parameters that the format never holds.
    """

    name: str
    marks: tuple[str, ...]
    table: Table
    backbone: type | None = None
    model: type[nnx.Module] | None = None
    infer: Callable[..., Any] | None = None
    read_config: Callable[[Path], Any] | None = None
    absent: str | None = None

    @property
    def whole(self) -> bool:
        """Holds a whole model rather than a backbone."""
        return self.model is not None


def _whole_formats() -> Iterator[Format]:
    marks = {
        SwinConfig: (r"backbone\.patch_embed", r"encoder\.embeddings\.patch_embeddings"),
        ResNetConfig: (r"backbone\.stem\.conv1", r"encoder\.embedder\.embedder"),
        MobileNetV2Config: (r"backbone\.features\.0\.0", None),
    }
    for backbone, (reference, transformers) in marks.items():
        name = backbone.__name__.removesuffix("Config")
        whole = dict(model=CropFormer, infer=infer_config)
        table = reference_table(backbone, association=True, reading=True)
        yield Format(f"reference ({name})", (reference, r"sem_seg_head\."), table, **whole)
        if transformers:
            whole["read_config"] = read_mask2former_config
            table = transformers_table(backbone)
            yield Format(f"transformers Mask2Former ({name})", (transformers, "pixel_level_module"), table, **whole)


def _json_reader(read: Callable[[Mapping[str, Any], str], Any]) -> Callable[[Path], Any]:
    def read_file(path: Path) -> Any:
        try:
            values = json.loads(path.read_text())
        except ValueError as error:
            raise ConversionError(f"{path} is not JSON: {error}") from error
        return read(values, str(path))

    return read_file


def _not_in_shapes(*_: Any) -> Any:
    raise ConversionError("the sizes of a GELLA do not show in its shapes: give a configuration (--config)")


def _language_formats() -> Iterator[Format]:
    tables, configs = language_tables, language_config
    yield Format("GELLA", (r"^resoblend\.", r"^colormap_encoder\."), GELLA, model=Gella, infer=_not_in_shapes)
    llava = dict(model=Llava, infer=configs.infer_llava)
    read = _json_reader(configs.read_llava)
    yield Format(
        "LLaVA of transformers",
        (r"^multi_modal_projector\.", r"^language_model\.model\."),
        tables.LLAVA,
        read_config=read,
        **llava,
    )
    yield Format(
        "LLaVA of transformers (names in memory)",
        (r"^model\.multi_modal_projector\.", r"^model\.language_model\."),
        tables.LLAVA_IN_MEMORY,
        read_config=read,
        **llava,
    )
    yield Format(
        "LLaVA (original)",
        (r"^model\.mm_projector\.", r"^model\.embed_tokens"),
        tables.llava_original_table(),
        read_config=_json_reader(configs.read_llava_original),
        **llava,
    )
    for name, marks, table, model, kind in (
        ("LLaMA", (r"^model\.embed_tokens", r"mlp\.gate_proj"), tables.LLAMA, Llama, "llama"),
        ("CLIP", (r"^vision_model\.", r"^text_model\."), tables.CLIP, Clip, "clip"),
        ("CLIP image side", (r"pre_layrnorm", r"class_embedding"), tables.CLIP_VISION, ClipVision, "clip_vision"),
        ("CLIP text side", (r"token_embedding", r"self_attn\.q_proj"), tables.CLIP_TEXT, ClipText, "clip_text"),
    ):
        infer, read = getattr(configs, f"infer_{kind}"), _json_reader(getattr(configs, f"read_{kind}"))
        yield Format(name, marks, table, model=model, infer=infer, read_config=read)


def our_shapes(reader: CheckpointReader, table: Table) -> dict[str, tuple[int, ...]]:
    """Our name -> shape for everything in the checkpoint that the table knows, without reading any tensor."""
    groups, _, _ = plan(list(reader), table)
    shapes: dict[str, tuple[int, ...]] = {}
    for (rule, values), parts in groups.items():
        theirs = [fill(template, dict(values)) for template in rule.theirs]
        if all(name in parts for name in theirs):
            empty = [np.broadcast_to(np.zeros((), np.bool_), reader.shape(parts[name])) for name in theirs]
            ours = (fill(template, dict(values)) for template in rule.ours)
            try:
                for name, x in zip(ours, rule.layout.to_ours(*empty), strict=True):
                    if rule.stacked:
                        count = max(dict(values)[rule.stacked] + 1, shapes.get(name, (0,))[0])
                        shapes[name] = (count, *x.shape)
                    else:
                        shapes[name] = x.shape
            except (ValueError, IndexError) as error:
                raise ConversionError(f"{', '.join(theirs)}: shape {empty[0].shape} does not fit: {error}") from error
    return shapes


def _count(shapes: Mapping[str, Any], pattern: str) -> int:
    """One more than the largest index that `pattern` captures; 0 when nothing fits."""
    found = (re.match(pattern, name) for name in shapes)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def infer_backbone_config(shapes: Mapping[str, tuple[int, ...]]) -> SwinConfig | ResNetConfig | MobileNetV2Config:
    """Sizes of a backbone from the shapes of its parameters (our names, relative to the backbone)."""
    depths = tuple(
        _count(shapes, rf"stages\.{stage}\.(\d+)\.") for stage in range(_count(shapes, r"stages\.(\d+)\.\d+\."))
    )
    if "patch_embed.kernel" in shapes:
        tables = [shapes[f"stages.{stage}.0.attention.relative_position_bias_table"] for stage in range(len(depths))]
        features, hidden = shapes["stages.0.0.fc1.kernel"]
        return SwinConfig(
            embed_dim=features,
            depths=depths,
            num_heads=tuple(heads for _, heads in tables),
            window_size=(round(tables[0][0] ** 0.5) + 1) // 2,
            mlp_ratio=hidden / features,
        )
    if "stages.0.0.conv1.conv.kernel" in shapes:
        *_, stem, bottleneck = shapes["stages.0.0.conv1.conv.kernel"]
        return ResNetConfig(depths=depths, stem_channels=stem, bottleneck_channels=bottleneck)
    return MobileNetV2Config()


def infer_config(shapes: Mapping[str, tuple[int, ...]], num_heads: int | None = None) -> CropFormerConfig:
    """Sizes of a whole model from the shapes of its parameters (our names).

    Args:
        shapes: our name -> shape.
        num_heads: attention heads everywhere but in the backbone, which shapes do not show; 8 by default.

    Raises:
        ConversionError: parameters that every model has are missing.
    """
    num_heads = num_heads or _HEADS
    backbone = {name.removeprefix("backbone."): s for name, s in shapes.items() if name.startswith("backbone.")}
    try:
        levels, conv_dim = shapes["pixel_decoder.level_embed"]
        samples = shapes["pixel_decoder.layers.0.attention.attention_weights.bias"][0]
        association = None
        if layers := _count(shapes, r"association\.layers\.(\d+)\."):
            width = shapes["association.layers.0.ffn.mlp.layers.0.bias"][0]
            association = AssociationConfig(num_layers=layers, num_heads=num_heads, ffn_dim=width)
        num_queries, hidden_dim = shapes["mask_decoder.query_feat"]
        mask_dim = shapes["pixel_decoder.mask_features.bias"][0]
        return CropFormerConfig(
            backbone=infer_backbone_config(backbone),
            pixel_decoder=PixelDecoderConfig(
                conv_dim=conv_dim,
                mask_dim=mask_dim,
                num_layers=_count(shapes, r"pixel_decoder\.layers\.(\d+)\."),
                num_heads=num_heads,
                num_points=samples // (levels * num_heads),
                ffn_dim=shapes["pixel_decoder.layers.0.ffn.mlp.layers.0.bias"][0],
            ),
            mask_decoder=MaskDecoderConfig(
                hidden_dim=hidden_dim,
                mask_dim=mask_dim,
                num_heads=num_heads,
                ffn_dim=shapes["mask_decoder.layers.0.ffn.mlp.layers.0.bias"][0],
                num_layers=_count(shapes, r"mask_decoder\.layers\.(\d+)\."),
                num_queries=num_queries,
                num_classes=shapes["mask_decoder.class_head.bias"][0] - 1,
            ),
            association=association,
        )
    except KeyError as error:
        raise ConversionError(
            f"the checkpoint has nothing for our {error.args[0]}, so its sizes are unknown"
        ) from error


# The first format whose marks are all found is taken.
FORMATS = (
    *_whole_formats(),
    *_language_formats(),
    Format("Swin of Mask2Former", (r"^patch_embed\.proj", r"^norm0\."), backbone_tables.SWIN_DETECTION, SwinConfig),
    Format(
        "Swin of transformers (backbone)",
        (r"hidden_states_norms\.stage1", r"patch_embeddings\.projection"),
        backbone_tables.SWIN_HF_BACKBONE,
        SwinConfig,
    ),
    Format(
        "Swin of transformers",
        (r"patch_embeddings\.projection", r"layernorm_before"),
        backbone_tables.SWIN_HF,
        SwinConfig,
        absent=r"^norms\.",
    ),
    Format(
        "Swin of timm",
        (r"^patch_embed\.proj", r"^layers\.3\.downsample"),
        backbone_tables.SWIN_TIMM,
        SwinConfig,
        absent=r"^norms\.",
    ),
    Format(
        "Swin of Microsoft",
        (r"^patch_embed\.proj", r"^layers\.0\.downsample"),
        backbone_tables.SWIN_MICROSOFT,
        SwinConfig,
        absent=r"^norms\.",
    ),
    Format(
        "Swin of torchvision",
        (r"^features\.1\.0\.attn\.qkv",),
        backbone_tables.SWIN_TORCHVISION,
        SwinConfig,
        absent=r"^norms\.",
    ),
    Format(
        "ResNet of detectron2",
        (r"stem\.conv1\.weight", r"res2\.0\.conv1"),
        backbone_tables.RESNET_DETECTRON2,
        ResNetConfig,
    ),
    Format("ResNet of transformers", (r"embedder\.embedder\.convolution",), backbone_tables.RESNET_HF, ResNetConfig),
    Format(
        "ResNet of torchvision",
        (r"^conv1\.weight", r"^layer1\.0\.conv3"),
        backbone_tables.RESNET_TORCHVISION,
        ResNetConfig,
    ),
    Format(
        "MobileNetV2 of torchvision",
        (r"^features\.1\.conv\.0\.0",),
        backbone_tables.MOBILENET_TORCHVISION,
        MobileNetV2Config,
    ),
    Format("MobileNetV2 of transformers", (r"conv_stem\.first_conv",), backbone_tables.MOBILENET_HF, MobileNetV2Config),
)


def detect(names: list[str]) -> Format:
    """The format that a checkpoint with these names has.

    Raises:
        ConversionError: none that is known.
    """
    for candidate in FORMATS:
        if all(any(re.search(mark, name) for name in names) for mark in candidate.marks):
            return candidate
    known = ", ".join(candidate.name for candidate in FORMATS)
    raise ConversionError(f"unknown checkpoint: its first names are {', '.join(names[:5])}; known formats are {known}")
