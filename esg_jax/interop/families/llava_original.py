"""LLaVA-1.5 under the names of its own repository."""

from esg_jax.interop.convert import ConversionError
from esg_jax.interop.families import clip
from esg_jax.interop.families.family import Family, Format, Json, folder_writer
from esg_jax.interop.families.llama import llama_json, llama_rules, read_llama
from esg_jax.interop.families.llava import PARTS, infer_llava, verify, with_fewer_tokens, with_rows_of_llava
from esg_jax.interop.families.transformers_json import CACHES, only
from esg_jax.interop.readers import CheckpointReader
from esg_jax.interop.rules import Table, linear
from esg_jax.models.language.clip import ClipVisionConfig
from esg_jax.models.language.llava import Llava, LlavaConfig

_TOWER = "model.vision_tower.vision_tower."


def llava_original_table(projector: str | None = None) -> Table:
    """The repository that LLaVA was published with; `projector` is needed for writing only.

    Its files hold CLIP only when CLIP was trained.
    """
    tower = f"{_TOWER}vision_model."
    kinds = {
        "mlp2x_gelu": (
            *linear("model.mm_projector.0", "projector.fc1"),
            *linear("model.mm_projector.2", "projector.fc2"),
        ),
        "linear": linear("model.mm_projector", "projector.fc1"),
    }
    chosen = kinds.values() if projector is None else (kinds[projector],)
    return Table(
        rules=(
            *clip.clip_vision_rules(tower, "vision."),
            *(rule for rules in chosen for rule in rules),
            *llama_rules("model.", "lm_head", "llm."),
        ),
        renames=((r"^model\.vision_tower\.vision_tower\.(?!vision_model\.)", tower),),
        dropped=CACHES,
    )


def read_llava_original(values: Json, where: str) -> LlavaConfig:
    """From the flat configuration of LLaVA's own files; CLIP is named there, not described."""
    only(values, where, mm_vision_select_feature="patch")
    towers = {
        "openai/clip-vit-large-patch14-336": ClipVisionConfig.large_336(),
        "openai/clip-vit-large-patch14": ClipVisionConfig.large_224(),
    }
    tower = values.get("mm_vision_tower", "openai/clip-vit-large-patch14-336")
    if tower not in towers:
        raise ConversionError(f"{where}: mm_vision_tower is {tower!r}; choose one of {', '.join(towers)} or --config")
    return LlavaConfig(
        vision=towers[tower],
        llm=with_rows_of_llava(read_llama(values, where)),
        projector=values.get("mm_projector_type", "linear"),
        select_layer=values.get("mm_vision_select_layer", -2),
    )


def llava_original_json(config: LlavaConfig) -> Json:
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


def _with_clip(reader: CheckpointReader, other: CheckpointReader, family: Family) -> CheckpointReader:
    """These tensors together with those of a CLIP checkpoint."""
    if any(name.startswith(_TOWER) for name in reader):
        raise ConversionError(f"{reader.path} holds its own CLIP")
    if family not in (clip.FAMILY, clip.VISION):
        raise ConversionError(f"{other.path} is a checkpoint of a {family.model.__name__}, not of CLIP's image side")
    prefix = "vision_model." if family is clip.FAMILY else ""
    names = [name for name in other if name.startswith(prefix) and name != "visual_projection.weight"]
    return reader.joined({_TOWER + name: name for name in names}, other)


FAMILY = Family(
    model=Llava,
    config=LlavaConfig,
    formats=lambda: (
        Format("LLaVA (original)", (r"^model\.mm_projector\.", r"^model\.embed_tokens"), llava_original_table()),
    ),
    infer=infer_llava,
    read_json=read_llava_original,
    written_as="original",
    write=folder_writer(
        lambda config: llava_original_table(config.projector),
        llava_original_json,
        rows=lambda config: config.llm.vocab_size,
    ),
    verify=verify,
    parts=PARTS,
    complete=_with_clip,
    with_vocabulary=with_fewer_tokens,
)
