"""Mask2Former under the names of transformers, with its `config.json`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from esg_jax.interop.convert import ConversionError
from esg_jax.interop.families.backbones import BACKBONES, backbone_family
from esg_jax.interop.families.cropformer import OUR_ENCODER, OUR_LAYER, criterion, deformable, infer_config
from esg_jax.interop.families.family import Family, Format, InTransformers, Json, write_folder
from esg_jax.interop.rules import Table, conv, linear, norm, packed_attention, pointwise, same
from esg_jax.interop.verify import Difference, random_views, run_views, verify_transformers
from esg_jax.models.cropformer import CropFormer, CropFormerConfig
from esg_jax.models.cropformer.mask_decoder import MaskDecoderConfig
from esg_jax.models.cropformer.pixel_decoder import PixelDecoderConfig

_HF = "model.pixel_level_module"
_HF_ENCODER = f"{_HF}.decoder.encoder.layers.{{i}}"
_HF_DECODER = "model.transformer_module.decoder"
_HF_LAYER = f"{_HF_DECODER}.layers.{{i}}"
_HF_QKV = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}

_HEADS = Table(
    rules=(
        *pointwise(f"{_HF}.decoder.input_projections.{{i}}.0", "pixel_decoder.input_proj.{i}.conv", bias=True),
        *norm(f"{_HF}.decoder.input_projections.{{i}}.1", "pixel_decoder.input_proj.{i}.norm"),
        *same(f"{_HF}.decoder.level_embed", "pixel_decoder.level_embed"),
        *deformable(f"{_HF_ENCODER}.self_attn", f"{OUR_ENCODER}.attention"),
        *norm(f"{_HF_ENCODER}.self_attn_layer_norm", f"{OUR_ENCODER}.norm"),
        *linear(f"{_HF_ENCODER}.fc1", f"{OUR_ENCODER}.ffn.mlp.layers.0"),
        *linear(f"{_HF_ENCODER}.fc2", f"{OUR_ENCODER}.ffn.mlp.layers.1"),
        *norm(f"{_HF_ENCODER}.final_layer_norm", f"{OUR_ENCODER}.ffn.norm"),
        *pointwise(f"{_HF}.decoder.adapter_1.0", "pixel_decoder.lateral.conv"),
        *norm(f"{_HF}.decoder.adapter_1.1", "pixel_decoder.lateral.norm"),
        *conv(f"{_HF}.decoder.layer_1.0", "pixel_decoder.output.conv"),
        *norm(f"{_HF}.decoder.layer_1.1", "pixel_decoder.output.norm"),
        *pointwise(f"{_HF}.decoder.mask_projection", "pixel_decoder.mask_features", bias=True),
        *packed_attention(f"{_HF_LAYER}.cross_attn", f"{OUR_LAYER}.cross.attention"),
        *norm(f"{_HF_LAYER}.cross_attn_layer_norm", f"{OUR_LAYER}.cross.norm"),
        *(
            rule
            for ours, theirs in _HF_QKV.items()
            for rule in linear(f"{_HF_LAYER}.self_attn.{theirs}", f"{OUR_LAYER}.self_attention.attention.{ours}")
        ),
        *norm(f"{_HF_LAYER}.self_attn_layer_norm", f"{OUR_LAYER}.self_attention.norm"),
        *linear(f"{_HF_LAYER}.fc1", f"{OUR_LAYER}.ffn.mlp.layers.0"),
        *linear(f"{_HF_LAYER}.fc2", f"{OUR_LAYER}.ffn.mlp.layers.1"),
        *norm(f"{_HF_LAYER}.final_layer_norm", f"{OUR_LAYER}.ffn.norm"),
        *norm(f"{_HF_DECODER}.layernorm", "mask_decoder.norm"),
        *same("model.transformer_module.queries_features.weight", "mask_decoder.query_feat"),
        *same("model.transformer_module.queries_embedder.weight", "mask_decoder.query_embed"),
        *same("model.transformer_module.level_embed.weight", "mask_decoder.level_embed"),
        *linear("class_predictor", "mask_decoder.class_head"),
        *linear(f"{_HF_DECODER}.mask_predictor.mask_embedder.{{i}}.0", "mask_decoder.mask_head.layers.{i}"),
    ),
    buffers=(criterion("criterion"),),
)


def _inside(backbone: type) -> InTransformers:
    inside = backbone_family(backbone).transformers
    if inside is None:
        name = backbone.__name__.removesuffix("Config")
        raise ConversionError(f"transformers' Mask2Former has no {name} backbone")
    return inside


def transformers_table(backbone: type) -> Table:
    """The format of transformers' `Mask2FormerForUniversalSegmentation`, as saved to disk.

    Args:
        backbone: the backbone's configuration class.

    Raises:
        ConversionError: transformers has no Mask2Former with this backbone.
    """
    return _inside(backbone).table.prefixed(f"{_HF}.encoder.", "backbone.") + _HEADS


def _formats() -> Iterator[Format]:
    for family in BACKBONES:
        if family.transformers:
            marks = (rf"encoder\.{family.transformers.mark}", "pixel_level_module")
            name = f"transformers Mask2Former ({family.model.__name__})"
            yield Format(name, marks, transformers_table(family.config))


_STAGES = ["stage1", "stage2", "stage3", "stage4"]
_POINTS = 4


def mask2former_config(config: CropFormerConfig) -> dict[str, Any]:
    """The content of `config.json` for a model.

    Raises:
        ConversionError: transformers' Mask2Former lacks something: views, the backbone, other sampling points.
    """
    if config.association is not None:
        raise ConversionError("transformers' Mask2Former has no views; export a model without association")
    pixel, decoder = config.pixel_decoder, config.mask_decoder
    if pixel.num_points != _POINTS or pixel.num_heads != decoder.num_heads:
        raise ConversionError("transformers' Mask2Former needs 4 sampling points and as many heads in both decoders")
    inside = _inside(type(config.backbone))
    backbone = {"model_type": inside.model_type, **inside.write_json(config.backbone)}
    labels = {str(index): f"LABEL_{index}" for index in range(decoder.num_classes)}
    return {
        "architectures": ["Mask2FormerForUniversalSegmentation"],
        "model_type": "mask2former",
        "backbone_config": {**backbone, "out_features": _STAGES, "out_indices": [1, 2, 3, 4]},
        "feature_size": pixel.conv_dim,
        "mask_feature_size": pixel.mask_dim,
        "encoder_layers": pixel.num_layers,
        "encoder_feedforward_dim": pixel.ffn_dim,
        "num_attention_heads": pixel.num_heads,
        "hidden_dim": decoder.hidden_dim,
        "dim_feedforward": decoder.ffn_dim,
        "decoder_layers": decoder.num_layers + 1,  # counts the prediction from raw queries
        "num_queries": decoder.num_queries,
        "id2label": labels,
        "label2id": {label: int(index) for index, label in labels.items()},
        "dropout": 0.0,
        "pre_norm": False,
    }


def _read_json(values: Json, path: str) -> CropFormerConfig:
    """The model that a `config.json` describes; another kind of model, or an option we lack, is an error."""
    if values.get("model_type") != "mask2former":
        raise ConversionError(f"{path} describes a {values.get('model_type')!r}, not a mask2former")
    for key, needed in (("pre_norm", False), ("enforce_input_projection", False), ("activation_function", "relu")):
        if values.get(key, needed) != needed:
            raise ConversionError(f"{path}: {key} is {values[key]!r}, only {needed!r} is implemented")
    # Defaults are those of transformers' Mask2FormerConfig.
    get = {**_DEFAULTS, **values}.__getitem__
    heads = get("num_attention_heads")
    return CropFormerConfig(
        backbone=_read_backbone(values.get("backbone_config") or {}, path),
        pixel_decoder=PixelDecoderConfig(
            conv_dim=get("feature_size"),
            mask_dim=get("mask_feature_size"),
            num_layers=get("encoder_layers"),
            num_heads=heads,
            num_points=_POINTS,
            ffn_dim=get("encoder_feedforward_dim"),
        ),
        mask_decoder=MaskDecoderConfig(
            hidden_dim=get("hidden_dim"),
            mask_dim=get("mask_feature_size"),
            num_heads=heads,
            ffn_dim=get("dim_feedforward"),
            num_layers=get("decoder_layers") - 1,
            num_queries=get("num_queries"),
            num_classes=len(values["id2label"]) if "id2label" in values else values.get("num_labels", 2),
        ),
        association=None,
    )


_DEFAULTS = {
    "feature_size": 256,
    "mask_feature_size": 256,
    "hidden_dim": 256,
    "encoder_layers": 6,
    "encoder_feedforward_dim": 1024,
    "num_attention_heads": 8,
    "dim_feedforward": 2048,
    "decoder_layers": 10,
    "num_queries": 100,
}


def _read_backbone(values: Json, path: str) -> Any:
    kind = values.get("model_type", "swin")
    known = {family.transformers.model_type: family.transformers for family in BACKBONES if family.transformers}
    if kind not in known:
        raise ConversionError(f"{path}: the backbone is {kind!r}; only {', '.join(known)} are implemented")
    return known[kind].read_json(values, path)


def _write(path: Path, arrays: Mapping[str, Any], config: CropFormerConfig, max_shard_bytes: int) -> list[Path]:
    values = mask2former_config(config)
    return write_folder(path, arrays, transformers_table(type(config.backbone)), values, max_shard_bytes)


def verify(folder: Path, model: CropFormer, size: tuple[int, int] = (256, 256)) -> list[Difference]:
    """Compares `model` with transformers' Mask2Former loaded from `folder`, in float32 on a random image.

    Args:
        folder: what was written.
        model: ours, without views.
        size: height and width of the image. Below the size at which every Swin stage holds a whole window
            transformers shrinks the windows and rightly differs.

    Raises:
        ModuleNotFoundError: torch or transformers is not installed.
        ValueError: transformers did not find all weights in the folder.
    """
    image, extent = random_views(1, size)
    output = run_views(model, image, extent)
    normalized = np.asarray(model.normalize(jnp.asarray(image), jnp.asarray(extent)))[0]
    ours = {"class_queries_logits": output.image.logits[-1], "masks_queries_logits": output.image_mask_logits()[:, 0]}
    return verify_transformers(folder, {"pixel_values": normalized}, ours)


FAMILY = Family(
    model=CropFormer,
    config=CropFormerConfig,
    formats=_formats,
    infer=infer_config,
    read_json=_read_json,
    written_as="transformers",
    write=_write,
    verify=verify,
)
