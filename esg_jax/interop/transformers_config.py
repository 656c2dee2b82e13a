"""`config.json` of transformers' Mask2Former to and from our configuration."""

import json
from pathlib import Path
from typing import Any

from esg_jax.models.backbones.resnet import ResNetConfig
from esg_jax.models.backbones.swin import SwinConfig
from esg_jax.models.cropformer import CropFormerConfig
from esg_jax.models.mask_decoder import MaskDecoderConfig
from esg_jax.models.pixel_decoder import PixelDecoderConfig

_STAGES = ["stage1", "stage2", "stage3", "stage4"]
_LEVELS, _POINTS = 3, 4


def mask2former_config(config: CropFormerConfig) -> dict[str, Any]:
    """The content of `config.json` for a model.

    Raises:
        ValueError: the model has what transformers' Mask2Former lacks: views, MobileNetV2, other sampling points.
    """
    if config.association is not None:
        raise ValueError("transformers' Mask2Former has no views; export a model without association")
    pixel, decoder = config.pixel_decoder, config.mask_decoder
    if pixel.num_points != _POINTS or pixel.num_heads != decoder.num_heads:
        raise ValueError("transformers' Mask2Former needs 4 sampling points and as many heads in both decoders")
    labels = {str(index): f"LABEL_{index}" for index in range(decoder.num_classes)}
    return {
        "architectures": ["Mask2FormerForUniversalSegmentation"],
        "model_type": "mask2former",
        "backbone_config": _backbone_config(config.backbone),
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


def _backbone_config(backbone) -> dict[str, Any]:
    outputs = {"out_features": _STAGES, "out_indices": [1, 2, 3, 4]}
    if isinstance(backbone, SwinConfig):
        return {
            "model_type": "swin",
            "embed_dim": backbone.embed_dim,
            "depths": list(backbone.depths),
            "num_heads": list(backbone.num_heads),
            "window_size": backbone.window_size,
            "mlp_ratio": backbone.mlp_ratio,
            "drop_path_rate": backbone.drop_path_rate,
            **outputs,
        }
    if isinstance(backbone, ResNetConfig):
        return {
            "model_type": "resnet",
            "depths": list(backbone.depths),
            "embedding_size": backbone.stem_channels,
            "hidden_sizes": [4 * backbone.bottleneck_channels * 2**stage for stage in range(4)],
            "layer_type": "bottleneck",
            "downsample_in_first_stage": False,
            "downsample_in_bottleneck": False,
            **outputs,
        }
    raise ValueError(f"transformers' Mask2Former has no {type(backbone).__name__.removesuffix('Config')} backbone")


def read_mask2former_config(path: Path) -> CropFormerConfig:
    """The model that a `config.json` describes.

    Raises:
        ValueError: another kind of model, or an option we do not have.
    """
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if values.get("model_type") != "mask2former":
        raise ValueError(f"{path} describes a {values.get('model_type')!r}, not a mask2former")
    for key, needed in (("pre_norm", False), ("enforce_input_projection", False), ("activation_function", "relu")):
        if values.get(key, needed) != needed:
            raise ValueError(f"{path}: {key} is {values[key]!r}, only {needed!r} is implemented")
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


def _read_backbone(values: dict[str, Any], path: Path) -> SwinConfig | ResNetConfig:
    kind = values.get("model_type", "swin")
    if kind == "swin":
        return SwinConfig(
            embed_dim=values.get("embed_dim", 96),
            depths=tuple(values.get("depths", (2, 2, 18, 2))),
            num_heads=tuple(values.get("num_heads", (3, 6, 12, 24))),
            window_size=values.get("window_size", 7),
            mlp_ratio=values.get("mlp_ratio", 4.0),
            drop_path_rate=values.get("drop_path_rate", 0.3),
        )
    if kind == "resnet" and values.get("layer_type", "bottleneck") == "bottleneck":
        if values.get("downsample_in_bottleneck") or values.get("downsample_in_first_stage"):
            raise ValueError(f"{path}: a ResNet with the stride elsewhere than in the 3x3 convolution")
        return ResNetConfig(
            depths=tuple(values.get("depths", (3, 4, 6, 3))),
            stem_channels=values.get("embedding_size", 64),
            bottleneck_channels=values.get("hidden_sizes", [256])[0] // 4,
        )
    raise ValueError(f"{path}: the backbone is {kind!r}; only swin and bottleneck resnet are implemented")
