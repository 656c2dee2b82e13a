"""Name tables of whole models: the reference's CropFormer and Mask2Former, and transformers' Mask2Former."""

import numpy as np

from esg_jax.interop import backbone_tables as backbones
from esg_jax.interop.rules import Buffer, Table, conv, linear, norm, packed_attention, pointwise, same
from esg_jax.models.backbones.mobilenet_v2 import MobileNetV2Config
from esg_jax.models.backbones.resnet import ResNetConfig
from esg_jax.models.backbones.swin import SwinConfig

_NO_OBJECT_WEIGHT = 0.1


def _empty_weight(class_bias: np.ndarray) -> np.ndarray:
    """Class weights of the classification loss, stored with the model by the reference."""
    weights = np.ones(class_bias.shape, np.float32)
    weights[-1] = _NO_OBJECT_WEIGHT
    return weights


def _criterion(name: str) -> Buffer:
    # The weight is a choice of training; a checkpoint trained with another one is as good.
    return Buffer(f"{name}.empty_weight", "mask_decoder.class_head.bias", _empty_weight, checked=False)


_PIXEL = "sem_seg_head.pixel_decoder"
_ENCODER, _OUR_ENCODER = f"{_PIXEL}.transformer.encoder.layers.{{i}}", "pixel_decoder.layers.{i}"
_PREDICTOR = "sem_seg_head.predictor"
_OUR_LAYER = "mask_decoder.layers.{i}"


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


def _deformable(theirs: str, ours: str) -> tuple:
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
        *_deformable(f"{_ENCODER}.self_attn", f"{_OUR_ENCODER}.attention"),
        *norm(f"{_ENCODER}.norm1", f"{_OUR_ENCODER}.norm"),
        *linear(f"{_ENCODER}.linear1", f"{_OUR_ENCODER}.ffn.mlp.layers.0"),
        *linear(f"{_ENCODER}.linear2", f"{_OUR_ENCODER}.ffn.mlp.layers.1"),
        *norm(f"{_ENCODER}.norm2", f"{_OUR_ENCODER}.ffn.norm"),
        *pointwise(f"{_PIXEL}.adapter_1", "pixel_decoder.lateral.conv"),
        *norm(f"{_PIXEL}.adapter_1.norm", "pixel_decoder.lateral.norm"),
        *conv(f"{_PIXEL}.layer_1", "pixel_decoder.output.conv"),
        *norm(f"{_PIXEL}.layer_1.norm", "pixel_decoder.output.norm"),
        *pointwise(f"{_PIXEL}.mask_features", "pixel_decoder.mask_features", bias=True),
        *_attention_layers(_layer("cross_attention"), _layer("self_attention"), _layer("ffn"), _OUR_LAYER),
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

# MobileNetV2 does not occur in the reference; it gets torchvision's names.
_REFERENCE_BACKBONES = {
    SwinConfig: backbones.SWIN_DETECTION,
    ResNetConfig: backbones.RESNET_DETECTRON2,
    MobileNetV2Config: backbones.MOBILENET_TORCHVISION,
}


def reference_table(backbone: type, *, association: bool, reading: bool) -> Table:
    """The format of the reference code.

    Args:
        backbone: the backbone's configuration class.
        association: the model has views; this decides which loss buffers are written.
        reading: accept the buffers of either kind of model.
    """
    joint = (_criterion("criterion_2d"), _criterion("criterion_3d"))
    single = (_criterion("criterion"),)
    buffers = joint + single if reading else joint if association else single
    table = _REFERENCE_BACKBONES[backbone].prefixed("backbone.", "backbone.")
    return table + HEADS + _ASSOCIATION + Table(rules=(), buffers=buffers)


_HF = "model.pixel_level_module"
_HF_ENCODER = f"{_HF}.decoder.encoder.layers.{{i}}"
_HF_DECODER = "model.transformer_module.decoder"
_HF_LAYER = f"{_HF_DECODER}.layers.{{i}}"
_HF_QKV = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}

_HF_HEADS = Table(
    rules=(
        *pointwise(f"{_HF}.decoder.input_projections.{{i}}.0", "pixel_decoder.input_proj.{i}.conv", bias=True),
        *norm(f"{_HF}.decoder.input_projections.{{i}}.1", "pixel_decoder.input_proj.{i}.norm"),
        *same(f"{_HF}.decoder.level_embed", "pixel_decoder.level_embed"),
        *_deformable(f"{_HF_ENCODER}.self_attn", f"{_OUR_ENCODER}.attention"),
        *norm(f"{_HF_ENCODER}.self_attn_layer_norm", f"{_OUR_ENCODER}.norm"),
        *linear(f"{_HF_ENCODER}.fc1", f"{_OUR_ENCODER}.ffn.mlp.layers.0"),
        *linear(f"{_HF_ENCODER}.fc2", f"{_OUR_ENCODER}.ffn.mlp.layers.1"),
        *norm(f"{_HF_ENCODER}.final_layer_norm", f"{_OUR_ENCODER}.ffn.norm"),
        *pointwise(f"{_HF}.decoder.adapter_1.0", "pixel_decoder.lateral.conv"),
        *norm(f"{_HF}.decoder.adapter_1.1", "pixel_decoder.lateral.norm"),
        *conv(f"{_HF}.decoder.layer_1.0", "pixel_decoder.output.conv"),
        *norm(f"{_HF}.decoder.layer_1.1", "pixel_decoder.output.norm"),
        *pointwise(f"{_HF}.decoder.mask_projection", "pixel_decoder.mask_features", bias=True),
        *packed_attention(f"{_HF_LAYER}.cross_attn", f"{_OUR_LAYER}.cross.attention"),
        *norm(f"{_HF_LAYER}.cross_attn_layer_norm", f"{_OUR_LAYER}.cross.norm"),
        *(
            rule
            for ours, theirs in _HF_QKV.items()
            for rule in linear(f"{_HF_LAYER}.self_attn.{theirs}", f"{_OUR_LAYER}.self_attention.attention.{ours}")
        ),
        *norm(f"{_HF_LAYER}.self_attn_layer_norm", f"{_OUR_LAYER}.self_attention.norm"),
        *linear(f"{_HF_LAYER}.fc1", f"{_OUR_LAYER}.ffn.mlp.layers.0"),
        *linear(f"{_HF_LAYER}.fc2", f"{_OUR_LAYER}.ffn.mlp.layers.1"),
        *norm(f"{_HF_LAYER}.final_layer_norm", f"{_OUR_LAYER}.ffn.norm"),
        *norm(f"{_HF_DECODER}.layernorm", "mask_decoder.norm"),
        *same("model.transformer_module.queries_features.weight", "mask_decoder.query_feat"),
        *same("model.transformer_module.queries_embedder.weight", "mask_decoder.query_embed"),
        *same("model.transformer_module.level_embed.weight", "mask_decoder.level_embed"),
        *linear("class_predictor", "mask_decoder.class_head"),
        *linear(f"{_HF_DECODER}.mask_predictor.mask_embedder.{{i}}.0", "mask_decoder.mask_head.layers.{i}"),
    ),
    buffers=(_criterion("criterion"),),
)
_HF_BACKBONES = {SwinConfig: backbones.SWIN_HF_BACKBONE, ResNetConfig: backbones.RESNET_HF}


def transformers_table(backbone: type) -> Table:
    """The format of transformers' `Mask2FormerForUniversalSegmentation`, as saved to disk.

    Raises:
        ValueError: transformers has no Mask2Former with this backbone.
    """
    if backbone not in _HF_BACKBONES:
        raise ValueError(f"transformers' Mask2Former has no {backbone.__name__.removesuffix('Config')} backbone")
    return _HF_BACKBONES[backbone].prefixed(f"{_HF}.encoder.", "backbone.") + _HF_HEADS
