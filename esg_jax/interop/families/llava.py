"""LLaVA-1.5 under the names of transformers: on disk, and in memory as its versions since 4.52 have them."""

import dataclasses

import numpy as np
from flax import nnx

from esg_jax.interop.convert import ConversionError
from esg_jax.interop.families.clip import clip_vision_json, clip_vision_rules, infer_clip_vision, read_clip_vision
from esg_jax.interop.families.family import Family, Format, Json, Shapes, folder_writer, part
from esg_jax.interop.families.llama import infer_llama, llama_json, llama_rules, random_ids, read_llama, with_vocabulary
from esg_jax.interop.families.transformers_json import CACHES, only
from esg_jax.interop.rules import Table, linear
from esg_jax.interop.verify import Difference, verify_transformers
from esg_jax.models.language.clip import ClipVision, ClipVisionConfig
from esg_jax.models.language.llama import Llama, LlamaConfig
from esg_jax.models.language.llava import Llava, LlavaConfig, Projector

# LLaVA's own files stop at LLaMA's vocabulary; transformers' have 64 more rows, for <image>, <pad> and others.
_LLAMA_ROWS, _LLAVA_ROWS = 32000, 32064
# Class of a part -> prefix of its parameters.
PARTS = {ClipVision: "vision.", Projector: "projector.", Llama: "llm."}

# The files of LlavaForConditionalGeneration, which all versions write so, but for `vision_model.` in version 5.
LLAVA = Table(
    rules=(
        *clip_vision_rules("vision_tower.vision_model.", "vision."),
        *linear("multi_modal_projector.linear_1", "projector.fc1"),
        *linear("multi_modal_projector.linear_2", "projector.fc2"),
        *llama_rules("language_model.model.", "language_model.lm_head", "llm."),
    ),
    renames=((r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),),
    dropped=CACHES,
)
# The same model's names in memory, since version 4.52; version 5 drops `vision_model.` here too.
LLAVA_IN_MEMORY = Table(
    rules=(
        *clip_vision_rules("model.vision_tower.", "vision."),
        *linear("model.multi_modal_projector.linear_1", "projector.fc1"),
        *linear("model.multi_modal_projector.linear_2", "projector.fc2"),
        *llama_rules("model.language_model.", "lm_head", "llm."),
    ),
    renames=((r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),),
    dropped=CACHES,
)


def with_rows_of_llava(llm: LlamaConfig) -> LlamaConfig:
    """LLaMA's vocabulary grows to LLaVA's; another one stays."""
    return dataclasses.replace(llm, vocab_size=_LLAVA_ROWS) if llm.vocab_size == _LLAMA_ROWS else llm


def infer_llava(shapes: Shapes, num_heads: int | None = None) -> LlavaConfig:
    """From the shapes of a `Llava`; CLIP is ViT-L/14 for 336 pixels where it is not in the file."""
    vision = part(shapes, "vision.")
    return LlavaConfig(
        vision=infer_clip_vision(vision) if vision else ClipVisionConfig.large_336(),
        llm=with_rows_of_llava(infer_llama(part(shapes, "llm."), num_heads)),
        projector="mlp2x_gelu" if "projector.fc2.kernel" in shapes else "linear",
    )


def read_llava(values: Json, where: str) -> LlavaConfig:
    """From a LlavaConfig of transformers."""
    only(values, where, projector_hidden_act="gelu", vision_feature_select_strategy="default")
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


def llava_json(config: LlavaConfig) -> Json:
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


def with_fewer_tokens(config: LlavaConfig, rows: int) -> LlavaConfig:
    """See `llama.with_vocabulary`."""
    return dataclasses.replace(config, llm=with_vocabulary(config.llm, rows))


def verify(folder, model: Llava) -> list[Difference]:
    """Compares a LLaVA with transformers' model loaded from `folder`, in float32 on random input."""
    config = model.config
    side = config.vision.image_size
    image = np.random.default_rng(0).normal(size=(2, side, side, 3)).astype(np.float32)
    ids = random_ids(config.llm)
    places = np.full((2, config.vision.grid**2), config.image_id)
    ids = np.concatenate([ids[:, :3], places, ids[:, 3:]], axis=1)
    ours = {"logits": nnx.jit(Llava.__call__)(model, image, ids)}
    return verify_transformers(folder, {"pixel_values": image, "input_ids": ids}, ours)


FAMILY = Family(
    model=Llava,
    config=LlavaConfig,
    formats=lambda: (
        Format("LLaVA of transformers", (r"^multi_modal_projector\.", r"^language_model\.model\."), LLAVA),
        Format(
            "LLaVA of transformers (names in memory)",
            (r"^model\.multi_modal_projector\.", r"^model\.language_model\."),
            LLAVA_IN_MEMORY,
        ),
    ),
    infer=infer_llava,
    read_json=read_llava,
    written_as="transformers",
    write=folder_writer(lambda _: LLAVA, llava_json, rows=lambda config: config.llm.vocab_size),
    verify=verify,
    parts=PARTS,
    with_vocabulary=with_fewer_tokens,
)
