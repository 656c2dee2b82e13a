"""Name tables of CLIP, LLaMA and LLaVA. Layers have names of their own on their side and are stacked on ours."""

from esg_jax.interop.rules import Rule, Table, conv, linear, norm, same, stacked
from esg_jax.models.clip import Clip, ClipText, ClipVision
from esg_jax.models.llama import Llama
from esg_jax.models.llava import Llava, Projector

# Model -> class of a part -> prefix of its parameters.
PARTS = {
    Llava: {ClipVision: "vision.", Projector: "projector.", Llama: "llm."},
    Clip: {ClipVision: "vision.", ClipText: "text."},
}
# Recomputed from the configuration by every implementation.
_CACHES = (r".*rotary_emb\.inv_freq", r".*embeddings\.position_ids")


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


def llama_rules(theirs: str, head: str, ours: str = "") -> tuple[Rule, ...]:
    """A LLaMA; `theirs` is the prefix of its body, `head` the whole name of its head."""
    layer = f"{theirs}layers.{{i}}"
    projections = {
        "self_attn.q_proj": "attention.query",
        "self_attn.k_proj": "attention.key",
        "self_attn.v_proj": "attention.value",
        "self_attn.o_proj": "attention.out",
        "mlp.gate_proj": "mlp.gate",
        "mlp.up_proj": "mlp.up",
        "mlp.down_proj": "mlp.down",
    }
    blocks = [
        rule
        for name, our_name in projections.items()
        for rule in linear(f"{layer}.{name}", f"{ours}layers.{our_name}", bias=False)
    ]
    blocks += same(f"{layer}.input_layernorm.weight", f"{ours}layers.attention_norm.scale")
    blocks += same(f"{layer}.post_attention_layernorm.weight", f"{ours}layers.mlp_norm.scale")
    (head_rule,) = linear(head, f"{ours}head", bias=False)
    return (
        Rule((f"{theirs}embed_tokens.weight",), (f"{ours}embed.embedding",), growing=0),
        *stacked(blocks),
        *same(f"{theirs}norm.weight", f"{ours}norm.scale"),
        Rule(head_rule.theirs, head_rule.ours, head_rule.layout, growing=1),
    )


# transformers' CLIPVisionModel, with or without its projection. Version 5 drops `vision_model.`.
CLIP_VISION = Table(
    rules=clip_vision_rules("vision_model."),
    renames=((r"^(?=embeddings\.|encoder\.|pre_layrnorm|post_layernorm)", "vision_model."),),
    dropped=(*_CACHES, r"visual_projection\.weight"),
)
# CLIPTextModel and CLIPTextModelWithProjection.
CLIP_TEXT = Table(
    rules=(*clip_text_rules("text_model."), *linear("text_projection", "projection", bias=False)),
    renames=((r"^(?=embeddings\.|encoder\.|final_layer_norm)", "text_model."),),
    dropped=_CACHES,
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
    dropped=_CACHES,
)
# LlamaForCausalLM.
LLAMA = Table(rules=llama_rules("model.", "lm_head"), dropped=_CACHES)
# The files of LlavaForConditionalGeneration, which all versions write so, but for `vision_model.` in version 5.
LLAVA = Table(
    rules=(
        *clip_vision_rules("vision_tower.vision_model.", "vision."),
        *linear("multi_modal_projector.linear_1", "projector.fc1"),
        *linear("multi_modal_projector.linear_2", "projector.fc2"),
        *llama_rules("language_model.model.", "language_model.lm_head", "llm."),
    ),
    renames=((r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),),
    dropped=_CACHES,
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
    dropped=_CACHES,
)


def llava_original_table(projector: str | None = None) -> Table:
    """The repository that LLaVA was published with; `projector` is needed for writing only.

    Its files hold CLIP only when CLIP was trained.
    """
    tower = "model.vision_tower.vision_tower.vision_model."
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
            *clip_vision_rules(tower, "vision."),
            *(rule for rules in chosen for rule in rules),
            *llama_rules("model.", "lm_head", "llm."),
        ),
        renames=((r"^model\.vision_tower\.vision_tower\.(?!vision_model\.)", tower),),
        dropped=_CACHES,
    )
