"""Sizes of CLIP, LLaMA and LLaVA: from the shapes of their parameters, and from and to `config.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from esg_jax.interop.convert import ConversionError
from esg_jax.models.clip import ClipConfig, ClipTextConfig, ClipVisionConfig
from esg_jax.models.llama import LlamaConfig
from esg_jax.models.llava import LlavaConfig

Shapes = Mapping[str, tuple[int, ...]]

# Shapes do not show the number of heads; these are the head sizes of every published CLIP and LLaMA-2.
_CLIP_HEAD_DIM = 64
_LLAMA_HEAD_DIM = 128
# LLaVA's own files stop at LLaMA's vocabulary; transformers' have 64 more rows, for <image>, <pad> and others.
_LLAMA_VOCABULARY, _LLAVA_VOCABULARY = 32000, 32064


def _part(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def _heads(width: int, head_dim: int, num_heads: int | None, what: str) -> int:
    if num_heads is None and width % head_dim:
        raise ConversionError(
            f"{what} is {width} channels wide, no multiple of {head_dim}: name its heads with --num-heads, or give a "
            "configuration"
        )
    return num_heads or width // head_dim


def infer_clip_vision(shapes: Shapes, num_heads: int | None = None) -> ClipVisionConfig:
    """From the shapes of a `ClipVision`."""
    patch, _, _, width = shapes["patch_embed.kernel"]
    layers, _, ffn_dim = shapes["layers.fc1.kernel"]
    return ClipVisionConfig(
        image_size=patch * round((shapes["position_embed"][0] - 1) ** 0.5),
        patch_size=patch,
        width=width,
        num_layers=layers,
        num_heads=_heads(width, _CLIP_HEAD_DIM, num_heads, "CLIP's image side"),
        ffn_dim=ffn_dim,
    )


def infer_clip_text(shapes: Shapes, num_heads: int | None = None) -> ClipTextConfig:
    """From the shapes of a `ClipText`; the end of a text is the last id of the vocabulary, as in every CLIP."""
    vocab_size, width = shapes["token_embed.embedding"]
    layers, _, ffn_dim = shapes["layers.fc1.kernel"]
    return ClipTextConfig(
        vocab_size=vocab_size,
        max_length=shapes["position_embed"][0],
        width=width,
        num_layers=layers,
        num_heads=_heads(width, _CLIP_HEAD_DIM, num_heads, "CLIP's text side"),
        ffn_dim=ffn_dim,
        eos_id=vocab_size - 1,
        projection_dim=shapes.get("projection.kernel", (0, None))[1],
    )


def infer_clip(shapes: Shapes, num_heads: int | None = None) -> ClipConfig:
    """From the shapes of a `Clip`."""
    parts = _part(shapes, "vision."), _part(shapes, "text.")
    return ClipConfig(infer_clip_vision(parts[0], num_heads), infer_clip_text(parts[1], num_heads))


def infer_llama(shapes: Shapes, num_heads: int | None = None) -> LlamaConfig:
    """From the shapes of a `Llama`, as LLaMA-2 where they do not tell."""
    vocab_size, width = shapes["embed.embedding"]
    layers, _, ffn_dim = shapes["layers.mlp.gate.kernel"]
    heads = _heads(width, _LLAMA_HEAD_DIM, num_heads, "the language model")
    return LlamaConfig(
        vocab_size=vocab_size,
        width=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=shapes["layers.attention.key.kernel"][2] * heads // width,
        ffn_dim=ffn_dim,
        tied="head.kernel" not in shapes,
    )


def infer_llava(shapes: Shapes, num_heads: int | None = None) -> LlavaConfig:
    """From the shapes of a `Llava`; CLIP is ViT-L/14 for 336 pixels where it is not in the file."""
    vision = _part(shapes, "vision.")
    llm = infer_llama(_part(shapes, "llm."), num_heads)
    if llm.vocab_size == _LLAMA_VOCABULARY:
        llm = dataclasses.replace(llm, vocab_size=_LLAVA_VOCABULARY)
    return LlavaConfig(
        vision=infer_clip_vision(vision) if vision else ClipVisionConfig.large_336(),
        llm=llm,
        projector="mlp2x_gelu" if "projector.fc2.kernel" in shapes else "linear",
    )


def _only(values: Mapping[str, Any], where: str, **needed: Any) -> None:
    for key, value in needed.items():
        if values.get(key, value) != value:
            raise ConversionError(f"{where}: {key} is {values[key]!r}, only {value!r} is implemented")


def _read(values: Mapping[str, Any], names: Mapping[str, str], defaults: Any) -> dict[str, Any]:
    """{our field: value} by {our field: their key}."""
    return {ours: values.get(theirs, getattr(defaults, ours)) for ours, theirs in names.items()}


_BLOCKS = {
    "width": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "ffn_dim": "intermediate_size",
}
_VISION = {**_BLOCKS, "image_size": "image_size", "patch_size": "patch_size"}
_TEXT = {**_BLOCKS, "vocab_size": "vocab_size", "max_length": "max_position_embeddings"}
_LLAMA = {
    **_BLOCKS,
    "vocab_size": "vocab_size",
    "num_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "rope_base": "rope_theta",
    "max_length": "max_position_embeddings",
    "tied": "tie_word_embeddings",
}
# transformers' defaults, where they are not ours.
_VISION_BASE = ClipVisionConfig(224, 32, 768, 12, 12, 3072)
_TEXT_BASE = ClipTextConfig(width=512, num_heads=8, ffn_dim=2048, projection_dim=512)
_LLAMA_BASE = LlamaConfig(vocab_size=32000, norm_eps=1e-6, max_length=2048)
_ORIGINAL_EOS = 49407


def read_clip_vision(values: Mapping[str, Any], where: str) -> ClipVisionConfig:
    """From a CLIPVisionConfig, or a CLIPConfig that holds one."""
    values = values.get("vision_config", values)
    _only(values, where, hidden_act="quick_gelu", layer_norm_eps=1e-5)
    return ClipVisionConfig(**_read(values, _VISION, _VISION_BASE))


def read_clip_text(values: Mapping[str, Any], where: str) -> ClipTextConfig:
    """From a CLIPTextConfig, or a CLIPConfig that holds one; without projection unless the class has one."""
    whole = values.get("model_type") == "clip"
    inner = values.get("text_config", values)
    _only(inner, where, hidden_act="quick_gelu", layer_norm_eps=1e-5)
    projected = whole or "CLIPTextModelWithProjection" in (values.get("architectures") or ())
    dim = (values if whole else inner).get("projection_dim", 512)
    eos = inner.get("eos_token_id", _ORIGINAL_EOS)
    if eos == 2:  # a mistake in OpenAI's files, which transformers works around
        eos = inner.get("vocab_size", _TEXT_BASE.vocab_size) - 1
    return ClipTextConfig(**_read(inner, _TEXT, _TEXT_BASE), eos_id=eos, projection_dim=dim if projected else None)


def read_clip(values: Mapping[str, Any], where: str) -> ClipConfig:
    """From a CLIPConfig."""
    return ClipConfig(read_clip_vision(values, where), read_clip_text(values, where))


def read_llama(values: Mapping[str, Any], where: str) -> LlamaConfig:
    """From a LlamaConfig."""
    _only(values, where, hidden_act="silu", attention_bias=False, mlp_bias=False)
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ConversionError(f"{where}: rotary positions are scaled ({rope}), which is not implemented")
    fields = _read({"rope_theta": rope.get("rope_theta", 10000.0), **values}, _LLAMA, _LLAMA_BASE)
    if "num_key_value_heads" not in values:
        fields["num_kv_heads"] = fields["num_heads"]
    _only(values, where, head_dim=fields["width"] // fields["num_heads"])
    return LlamaConfig(**fields)


def read_llava(values: Mapping[str, Any], where: str) -> LlavaConfig:
    """From a LlavaConfig of transformers."""
    _only(values, where, projector_hidden_act="gelu", vision_feature_select_strategy="default")
    text = values.get("text_config", {})
    if "hidden_size" not in text and text.get("_name_or_path"):  # LLaVA's first files name the model instead
        text = {**_KNOWN_TEXT.get(text["_name_or_path"], {}), **text}
    return LlavaConfig(
        vision=read_clip_vision(values.get("vision_config", {}), where),
        llm=read_llama(text, where),
        select_layer=values.get("vision_feature_layer", -2),
        image_id=values.get("image_token_index", values.get("image_token_id", 32000)),
    )


# What "text_config" leaves out of the published LLaVA-1.5 files.
_KNOWN_TEXT = {
    "lmsys/vicuna-7b-v1.5": {"rms_norm_eps": 1e-5},
    "lmsys/vicuna-13b-v1.5": {
        "rms_norm_eps": 1e-5,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
    },
}


def read_llava_original(values: Mapping[str, Any], where: str) -> LlavaConfig:
    """From the flat configuration of LLaVA's own files; CLIP is named there, not described."""
    _only(values, where, mm_vision_select_feature="patch")
    towers = {
        "openai/clip-vit-large-patch14-336": ClipVisionConfig.large_336(),
        "openai/clip-vit-large-patch14": ClipVisionConfig.large_224(),
    }
    tower = values.get("mm_vision_tower", "openai/clip-vit-large-patch14-336")
    if tower not in towers:
        raise ConversionError(f"{where}: mm_vision_tower is {tower!r}; choose one of {', '.join(towers)} or --config")
    llm = read_llama(values, where)
    if llm.vocab_size == _LLAMA_VOCABULARY:
        llm = dataclasses.replace(llm, vocab_size=_LLAVA_VOCABULARY)
    return LlavaConfig(
        vision=towers[tower],
        llm=llm,
        projector=values.get("mm_projector_type", "linear"),
        select_layer=values.get("mm_vision_select_layer", -2),
    )


def _write(config: Any, names: Mapping[str, str]) -> dict[str, Any]:
    return {theirs: getattr(config, ours) for ours, theirs in names.items()}


def clip_vision_json(config: ClipVisionConfig) -> dict[str, Any]:
    """`config.json` of a CLIPVisionModel."""
    values = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, **_write(config, _VISION)}
    return {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", **values}


def clip_text_json(config: ClipTextConfig) -> dict[str, Any]:
    """`config.json` of a CLIPTextModel or CLIPTextModelWithProjection."""
    projected = config.projection_dim is not None
    values = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "eos_token_id": config.eos_id}
    values |= _write(config, _TEXT) | ({"projection_dim": config.projection_dim} if projected else {})
    name = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    return {"architectures": [name], "model_type": "clip_text_model", **values}


def clip_json(config: ClipConfig) -> dict[str, Any]:
    """`config.json` of a CLIPModel."""
    parts = {"vision_config": clip_vision_json(config.vision), "text_config": clip_text_json(config.text)}
    for part in parts.values():
        del part["architectures"]
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.text.projection_dim,
        **parts,
    }


def llama_json(config: LlamaConfig) -> dict[str, Any]:
    """`config.json` of a LlamaForCausalLM."""
    values = {"hidden_act": "silu", **_write(config, _LLAMA)}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **values}


def llava_json(config: LlavaConfig) -> dict[str, Any]:
    """`config.json` of a LlavaForConditionalGeneration.

    Raises:
        ConversionError: a linear projector, which transformers does not have.
    """
    if config.projector != "mlp2x_gelu":
        raise ConversionError(f"transformers' LLaVA has no {config.projector} projector; write the original layout")
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": config.image_id,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": config.select_layer,
        "vision_feature_select_strategy": "default",
        "image_seq_length": config.vision.grid**2,
        "tie_word_embeddings": config.llm.tied,
        "text_config": llama_json(config.llm),
        "vision_config": clip_vision_json(config.vision),
    }


def llava_original_json(config: LlavaConfig) -> dict[str, Any]:
    """The configuration of LLaVA's own files."""
    return {
        **llama_json(config.llm),
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "mm_hidden_size": config.vision.width,
        "mm_projector_type": config.projector,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": config.select_layer,
        "mm_vision_tower": "openai/clip-vit-large-patch14" + ("-336" if config.vision.image_size == 336 else ""),
    }
