"""CLIP under the names of transformers: both sides, or either. Layers are stacked on our side."""

import numpy as np
from flax import nnx

from esg_jax.interop.families.family import Family, Format, Json, Shapes, folder_writer, part
from esg_jax.interop.families.transformers_json import BLOCKS, CACHES, heads, only, read_fields, write_fields
from esg_jax.interop.rules import Rule, Table, conv, linear, norm, same, stacked
from esg_jax.interop.verify import Difference, verify_transformers
from esg_jax.models.language.clip import Clip, ClipConfig, ClipText, ClipTextConfig, ClipVision, ClipVisionConfig

# Shapes do not show the number of heads; this is the head size of every published CLIP.
_HEAD_DIM = 64


def _clip_blocks(theirs: str, ours: str) -> tuple[Rule, ...]:
    layer = f"{theirs}encoder.layers.{{i}}"
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}
    return stacked(
        (
            *norm(f"{layer}.layer_norm1", f"{ours}layers.attention_norm"),
            *(
                rule
                for name, our_name in names.items()
                for rule in linear(f"{layer}.self_attn.{name}", f"{ours}layers.attention.{our_name}")
            ),
            *norm(f"{layer}.layer_norm2", f"{ours}layers.mlp_norm"),
            *linear(f"{layer}.mlp.fc1", f"{ours}layers.fc1"),
            *linear(f"{layer}.mlp.fc2", f"{ours}layers.fc2"),
        )
    )


def clip_vision_rules(theirs: str, ours: str = "") -> tuple[Rule, ...]:
    """The image transformer below a prefix on either side."""
    return (
        *same(f"{theirs}embeddings.class_embedding", f"{ours}class_embed"),
        *conv(f"{theirs}embeddings.patch_embedding", f"{ours}patch_embed"),
        *same(f"{theirs}embeddings.position_embedding.weight", f"{ours}position_embed"),
        *norm(f"{theirs}pre_layrnorm", f"{ours}pre_norm"),  # spelled so
        *_clip_blocks(theirs, ours),
        *norm(f"{theirs}post_layernorm", f"{ours}post_norm"),
    )


def clip_text_rules(theirs: str, ours: str = "") -> tuple[Rule, ...]:
    """The text transformer below a prefix on either side, without its projection."""
    return (
        *same(f"{theirs}embeddings.token_embedding.weight", f"{ours}token_embed.embedding"),
        *same(f"{theirs}embeddings.position_embedding.weight", f"{ours}position_embed"),
        *_clip_blocks(theirs, ours),
        *norm(f"{theirs}final_layer_norm", f"{ours}final_norm"),
    )


# transformers' CLIPVisionModel, with or without its projection. Version 5 drops `vision_model.`.
CLIP_VISION = Table(
    rules=clip_vision_rules("vision_model."),
    renames=((r"^(?=embeddings\.|encoder\.|pre_layrnorm|post_layernorm)", "vision_model."),),
    dropped=(*CACHES, r"visual_projection\.weight"),
)
# CLIPTextModel and CLIPTextModelWithProjection.
CLIP_TEXT = Table(
    rules=(*clip_text_rules("text_model."), *linear("text_projection", "projection", bias=False)),
    renames=((r"^(?=embeddings\.|encoder\.|final_layer_norm)", "text_model."),),
    dropped=CACHES,
)
# CLIPModel: the files of the hub.
CLIP = Table(
    rules=(
        *clip_vision_rules("vision_model.", "vision."),
        *clip_text_rules("text_model.", "text."),
        *linear("visual_projection", "visual_projection", bias=False),
        *linear("text_projection", "text.projection", bias=False),
        *same("logit_scale", "logit_scale"),
    ),
    dropped=CACHES,
)


def infer_clip_vision(shapes: Shapes, num_heads: int | None = None) -> ClipVisionConfig:
    """From the shapes of a `ClipVision`."""
    patch, _, _, width = shapes["patch_embed.kernel"]
    layers, _, ffn_dim = shapes["layers.fc1.kernel"]
    return ClipVisionConfig(
        image_size=patch * round((shapes["position_embed"][0] - 1) ** 0.5),
        patch_size=patch,
        width=width,
        num_layers=layers,
        num_heads=heads(width, _HEAD_DIM, num_heads, "CLIP's image side"),
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
        num_heads=heads(width, _HEAD_DIM, num_heads, "CLIP's text side"),
        ffn_dim=ffn_dim,
        eos_id=vocab_size - 1,
        projection_dim=shapes.get("projection.kernel", (0, None))[1],
    )


def infer_clip(shapes: Shapes, num_heads: int | None = None) -> ClipConfig:
    """From the shapes of a `Clip`."""
    parts = part(shapes, "vision."), part(shapes, "text.")
    return ClipConfig(infer_clip_vision(parts[0], num_heads), infer_clip_text(parts[1], num_heads))


_VISION = {**BLOCKS, "image_size": "image_size", "patch_size": "patch_size"}
_TEXT = {**BLOCKS, "vocab_size": "vocab_size", "max_length": "max_position_embeddings"}
# transformers' defaults, where they are not ours.
_VISION_BASE = ClipVisionConfig(224, 32, 768, 12, 12, 3072)
_TEXT_BASE = ClipTextConfig(width=512, num_heads=8, ffn_dim=2048, projection_dim=512)
_ORIGINAL_EOS = 49407


def read_clip_vision(values: Json, where: str) -> ClipVisionConfig:
    """From a CLIPVisionConfig, or a CLIPConfig that holds one."""
    values = values.get("vision_config", values)
    only(values, where, hidden_act="quick_gelu", layer_norm_eps=1e-5)
    return ClipVisionConfig(**read_fields(values, _VISION, _VISION_BASE))


def read_clip_text(values: Json, where: str) -> ClipTextConfig:
    """From a CLIPTextConfig, or a CLIPConfig that holds one; without projection unless the class has one."""
    whole = values.get("model_type") == "clip"
    inner = values.get("text_config", values)
    only(inner, where, hidden_act="quick_gelu", layer_norm_eps=1e-5)
    projected = whole or "CLIPTextModelWithProjection" in (values.get("architectures") or ())
    dim = (values if whole else inner).get("projection_dim", 512)
    eos = inner.get("eos_token_id", _ORIGINAL_EOS)
    if eos == 2:  # a mistake in OpenAI's files, which transformers works around
        eos = inner.get("vocab_size", _TEXT_BASE.vocab_size) - 1
    return ClipTextConfig(
        **read_fields(inner, _TEXT, _TEXT_BASE), eos_id=eos, projection_dim=dim if projected else None
    )


def read_clip(values: Json, where: str) -> ClipConfig:
    """From a CLIPConfig."""
    return ClipConfig(read_clip_vision(values, where), read_clip_text(values, where))


def clip_vision_json(config: ClipVisionConfig) -> Json:
    """`config.json` of a CLIPVisionModel."""
    values = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, **write_fields(config, _VISION)}
    return {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", **values}


def clip_text_json(config: ClipTextConfig) -> Json:
    """`config.json` of a CLIPTextModel or CLIPTextModelWithProjection."""
    projected = config.projection_dim is not None
    values = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "eos_token_id": config.eos_id}
    values |= write_fields(config, _TEXT) | ({"projection_dim": config.projection_dim} if projected else {})
    name = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    return {"architectures": [name], "model_type": "clip_text_model", **values}


def clip_json(config: ClipConfig) -> Json:
    """`config.json` of a CLIPModel."""
    parts = {"vision_config": clip_vision_json(config.vision), "text_config": clip_text_json(config.text)}
    for side in parts.values():
        del side["architectures"]
    return {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": config.text.projection_dim, **parts}


def _image(config: ClipVisionConfig) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, config.image_size, config.image_size, 3)).astype(np.float32)


def _text(config: ClipTextConfig) -> np.ndarray:
    ids = np.random.default_rng(0).integers(3, min(config.vocab_size, 32000) - 1, (2, 8))
    ids[:, -1] = config.eos_id
    return ids


def _verify(folder, model: Clip) -> list[Difference]:
    image, ids = _image(model.config.vision), _text(model.config.text)
    ours = {"logits_per_image": nnx.jit(Clip.__call__)(model, image, ids)}
    return verify_transformers(folder, {"pixel_values": image, "input_ids": ids}, ours)


def _verify_vision(folder, model: ClipVision) -> list[Difference]:
    image = _image(model.config)
    return verify_transformers(
        folder, {"pixel_values": image}, {"pooler_output": nnx.jit(ClipVision.pooled)(model, image)}
    )


def _verify_text(folder, model: ClipText) -> list[Difference]:
    ids = _text(model.config)
    hidden, embedding = nnx.jit(ClipText.__call__)(model, ids)
    ours = {"last_hidden_state": hidden} | ({} if model.config.projection_dim is None else {"text_embeds": embedding})
    return verify_transformers(folder, {"input_ids": ids}, ours)


FAMILY = Family(
    model=Clip,
    config=ClipConfig,
    formats=lambda: (Format("CLIP", (r"^vision_model\.", r"^text_model\."), CLIP),),
    infer=infer_clip,
    read_json=read_clip,
    written_as="transformers",
    write=folder_writer(lambda _: CLIP, clip_json),
    verify=_verify,
    parts={ClipVision: "vision.", ClipText: "text."},
)
VISION = Family(
    model=ClipVision,
    config=ClipVisionConfig,
    formats=lambda: (Format("CLIP image side", (r"pre_layrnorm", r"class_embedding"), CLIP_VISION),),
    infer=infer_clip_vision,
    read_json=read_clip_vision,
    written_as="transformers",
    write=folder_writer(lambda _: CLIP_VISION, clip_vision_json),
    verify=_verify_vision,
)
TEXT = Family(
    model=ClipText,
    config=ClipTextConfig,
    formats=lambda: (Format("CLIP text side", (r"token_embedding", r"self_attn\.q_proj"), CLIP_TEXT),),
    infer=infer_clip_text,
    read_json=read_clip_text,
    written_as="transformers",
    write=folder_writer(lambda _: CLIP_TEXT, clip_text_json),
    verify=_verify_text,
)
