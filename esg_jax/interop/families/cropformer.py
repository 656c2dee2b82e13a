"""CropFormer and Mask2Former under the names of the reference code."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from esg_jax.config import to_dict
from esg_jax.interop.convert import CONFIG_KEY, ConversionError, empty_like, stream_from_ours
from esg_jax.interop.families.backbones import BACKBONES, backbone_family, infer_backbone
from esg_jax.interop.families.family import Family, Format, Shapes, count, part
from esg_jax.interop.rules import Buffer, Table, conv, linear, norm, packed_attention, pointwise, same
from esg_jax.interop.verify import Difference, compare, random_views, run_views
from esg_jax.interop.writers import write_pth, write_safetensors
from esg_jax.models.cropformer import CropFormer, CropFormerConfig
from esg_jax.models.cropformer.mask_decoder import MaskDecoderConfig
from esg_jax.models.cropformer.pixel_decoder import PixelDecoderConfig
from esg_jax.models.cropformer.view_association import AssociationConfig

_NO_OBJECT_WEIGHT = 0.1


def _empty_weight(class_bias: np.ndarray) -> np.ndarray:
    """Class weights of the classification loss, stored with the model by the reference."""
    weights = np.ones(class_bias.shape, np.float32)
    weights[-1] = _NO_OBJECT_WEIGHT
    return weights


def criterion(name: str) -> Buffer:
    # The weight is a choice of training; a checkpoint trained with another one is as good.
    return Buffer(f"{name}.empty_weight", "mask_decoder.class_head.bias", _empty_weight, checked=False)


_PIXEL = "sem_seg_head.pixel_decoder"
_ENCODER, OUR_ENCODER = f"{_PIXEL}.transformer.encoder.layers.{{i}}", "pixel_decoder.layers.{i}"
_PREDICTOR = "sem_seg_head.predictor"
OUR_LAYER = "mask_decoder.layers.{i}"


def _layer(kind: str) -> str:
    return f"{_PREDICTOR}.transformer_{kind}_layers.{{i}}"


def _attention_layers(cross: str, self_attention: str, ffn: str, ours: str) -> tuple:
    """Post-norm cross attention, self attention and feed-forward layers."""
    return (
        *packed_attention(f"{cross}.multihead_attn", f"{ours}.cross.attention"),
        *norm(f"{cross}.norm", f"{ours}.cross.norm"),
        *packed_attention(f"{self_attention}.self_attn", f"{ours}.self_attention.attention"),
        *norm(f"{self_attention}.norm", f"{ours}.self_attention.norm"),
        *linear(f"{ffn}.linear1", f"{ours}.ffn.mlp.layers.0"),
        *linear(f"{ffn}.linear2", f"{ours}.ffn.mlp.layers.1"),
        *norm(f"{ffn}.norm", f"{ours}.ffn.norm"),
    )


def deformable(theirs: str, ours: str) -> tuple:
    return (
        *linear(f"{theirs}.sampling_offsets", f"{ours}.sampling_offsets"),
        *linear(f"{theirs}.attention_weights", f"{ours}.attention_weights"),
        *linear(f"{theirs}.value_proj", f"{ours}.value"),
        *linear(f"{theirs}.output_proj", f"{ours}.out"),
    )


HEADS = Table(
    rules=(
        *pointwise(f"{_PIXEL}.input_proj.{{i}}.0", "pixel_decoder.input_proj.{i}.conv", bias=True),
        *norm(f"{_PIXEL}.input_proj.{{i}}.1", "pixel_decoder.input_proj.{i}.norm"),
        *same(f"{_PIXEL}.transformer.level_embed", "pixel_decoder.level_embed"),
        *deformable(f"{_ENCODER}.self_attn", f"{OUR_ENCODER}.attention"),
        *norm(f"{_ENCODER}.norm1", f"{OUR_ENCODER}.norm"),
        *linear(f"{_ENCODER}.linear1", f"{OUR_ENCODER}.ffn.mlp.layers.0"),
        *linear(f"{_ENCODER}.linear2", f"{OUR_ENCODER}.ffn.mlp.layers.1"),
        *norm(f"{_ENCODER}.norm2", f"{OUR_ENCODER}.ffn.norm"),
        *pointwise(f"{_PIXEL}.adapter_1", "pixel_decoder.lateral.conv"),
        *norm(f"{_PIXEL}.adapter_1.norm", "pixel_decoder.lateral.norm"),
        *conv(f"{_PIXEL}.layer_1", "pixel_decoder.output.conv"),
        *norm(f"{_PIXEL}.layer_1.norm", "pixel_decoder.output.norm"),
        *pointwise(f"{_PIXEL}.mask_features", "pixel_decoder.mask_features", bias=True),
        *_attention_layers(_layer("cross_attention"), _layer("self_attention"), _layer("ffn"), OUR_LAYER),
        *norm(f"{_PREDICTOR}.decoder_norm", "mask_decoder.norm"),
        *same(f"{_PREDICTOR}.query_feat.weight", "mask_decoder.query_feat"),
        *same(f"{_PREDICTOR}.query_embed.weight", "mask_decoder.query_embed"),
        *same(f"{_PREDICTOR}.level_embed.weight", "mask_decoder.level_embed"),
        *linear(f"{_PREDICTOR}.class_embed", "mask_decoder.class_head"),
        *linear(f"{_PREDICTOR}.mask_embed.layers.{{i}}", "mask_decoder.mask_head.layers.{i}"),
    ),
    renames=(
        (r"^(?:module\.)?(?:model\.)?(?=backbone|sem_seg_head|criterion)", ""),
        (r"static_query", "query_feat"),
        (r"pixel_decoder\.pixel_decoder\.", "pixel_decoder."),
        # Before Mask2Former's version 2 the pixel decoder had no level of its own.
        (r"^sem_seg_head\.(?!pixel_decoder\.|predictor\.)", "sem_seg_head.pixel_decoder."),
    ),
    dropped=(r"pixel_(mean|std)",),
)

_ASSOCIATION = Table(
    rules=_attention_layers(
        f"{_PREDICTOR}.make_3d.enc_crosattn_3d.{{i}}",
        f"{_PREDICTOR}.make_3d.enc_selfattn_3d.{{i}}",
        f"{_PREDICTOR}.make_3d.enc_ffn_3d.{{i}}",
        "association.layers.{i}",
    )
)


def backbone_table(backbone: type, theirs: str, ours: str) -> Table:
    """The reference's names of a backbone, by the class of its configuration, below prefixes.

    Raises:
        ConversionError: it has none.
    """
    inside = backbone_family(backbone).reference
    if inside is None:
        raise ConversionError(f"the reference's names do not cover a {backbone.__name__}")
    return inside.table.prefixed(theirs, ours)


def reference_table(backbone: type, *, association: bool, reading: bool) -> Table:
    """The format of the reference code.

    Args:
        backbone: the backbone's configuration class.
        association: the model has views; this decides which loss buffers are written.
        reading: accept the buffers of either kind of model.

    Raises:
        ConversionError: such models have no names with this backbone.
    """
    joint = (criterion("criterion_2d"), criterion("criterion_3d"))
    single = (criterion("criterion"),)
    buffers = joint + single if reading else joint if association else single
    return backbone_table(backbone, "backbone.", "backbone.") + HEADS + _ASSOCIATION + Table(rules=(), buffers=buffers)


def _formats() -> Iterator[Format]:
    for family in BACKBONES:
        if family.reference:
            marks = (rf"backbone\.{family.reference.mark}", r"sem_seg_head\.")
            table = reference_table(family.config, association=True, reading=True)
            yield Format(f"reference ({family.model.__name__})", marks, table)


# Shapes do not show the number of attention heads; the reference always uses this many.
_HEADS = 8


def infer_config(shapes: Shapes, num_heads: int | None = None) -> CropFormerConfig:
    """Sizes of a whole model from the shapes of its parameters.

    Args:
        shapes: our name -> shape.
        num_heads: attention heads everywhere but in the backbone, which shapes do not show; 8 by default.

    Raises:
        KeyError: a parameter that every model has is missing.
        ConversionError: no backbone has such parameters.
    """
    num_heads = num_heads or _HEADS
    levels, conv_dim = shapes["pixel_decoder.level_embed"]
    samples = shapes["pixel_decoder.layers.0.attention.attention_weights.bias"][0]
    association = None
    if layers := count(shapes, r"association\.layers\.(\d+)\."):
        width = shapes["association.layers.0.ffn.mlp.layers.0.bias"][0]
        association = AssociationConfig(num_layers=layers, num_heads=num_heads, ffn_dim=width)
    num_queries, hidden_dim = shapes["mask_decoder.query_feat"]
    mask_dim = shapes["pixel_decoder.mask_features.bias"][0]
    return CropFormerConfig(
        backbone=infer_backbone(part(shapes, "backbone.")),
        pixel_decoder=PixelDecoderConfig(
            conv_dim=conv_dim,
            mask_dim=mask_dim,
            num_layers=count(shapes, r"pixel_decoder\.layers\.(\d+)\."),
            num_heads=num_heads,
            num_points=samples // (levels * num_heads),
            ffn_dim=shapes["pixel_decoder.layers.0.ffn.mlp.layers.0.bias"][0],
        ),
        mask_decoder=MaskDecoderConfig(
            hidden_dim=hidden_dim,
            mask_dim=mask_dim,
            num_heads=num_heads,
            ffn_dim=shapes["mask_decoder.layers.0.ffn.mlp.layers.0.bias"][0],
            num_layers=count(shapes, r"mask_decoder\.layers\.(\d+)\."),
            num_queries=num_queries,
            num_classes=shapes["mask_decoder.class_head.bias"][0] - 1,
        ),
        association=association,
    )


def _write(path: Path, arrays: Mapping[str, Any], config: CropFormerConfig, max_shard_bytes: int) -> list[Path]:
    """One file, whose ending (.pth or .safetensors) chooses the kind."""
    table = reference_table(type(config.backbone), association=config.association is not None, reading=False)
    metadata = {CONFIG_KEY: json.dumps(to_dict(config))}
    if path.suffix not in (".pth", ".safetensors"):
        raise ConversionError(f"{path.name}: the ending must be .pth or .safetensors")
    if path.suffix == ".pth":
        write_pth(path, stream_from_ours(arrays, table), metadata)
    else:
        layout = {name: (x.shape, x.dtype) for name, x in stream_from_ours(empty_like(arrays), table)}
        write_safetensors(path, layout, stream_from_ours(arrays, table), {"format": "pt", **metadata})
    return [path]


def _verify(path: Path, model: CropFormer) -> list[Difference]:
    """Compares `model` in float32 with the PyTorch network beside, which loads `path`; with views at the batch level.

    PyTorch computes in float64. Its float32 GroupNorm takes the variance as a difference of means, which loses up to
    three digits where a channel varies little around a large mean; ours does not, and should not be charged for it.
    """
    import torch

    from esg_jax.interop.pytorch.cropformer import load

    joint = model.config.association is not None
    image, extent = random_views(2 if joint else 1, (128, 160))
    output = run_views(model, image, extent)
    with torch.inference_mode():
        views = torch.from_numpy(image.transpose(0, 1, 4, 2, 3).copy()).double()
        logits, masks = load(path).double()(views, torch.from_numpy(extent))
    if joint:
        ours = output.batch.logits[-1], output.batch_mask_logits()
    else:
        ours = output.image.logits[-1], output.image_mask_logits().swapaxes(1, 2)
    return [compare("class logits", ours[0], logits), compare("mask logits", ours[1], masks)]


FAMILY = Family(
    model=CropFormer,
    config=CropFormerConfig,
    formats=_formats,
    infer=infer_config,
    written_as="reference",
    write=_write,
    verify=_verify,
)
