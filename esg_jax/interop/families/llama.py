"""LLaMA under the names of transformers. Layers are stacked on our side."""

import dataclasses

import numpy as np
from flax import nnx

from esg_jax.interop.convert import ConversionError
from esg_jax.interop.families.family import Family, Format, Json, Shapes, folder_writer
from esg_jax.interop.families.transformers_json import BLOCKS, CACHES, heads, only, read_fields, write_fields
from esg_jax.interop.rules import Rule, Table, linear, same, stacked
from esg_jax.interop.verify import Difference, verify_transformers
from esg_jax.models.language.llama import Llama, LlamaConfig

# Shapes do not show the number of heads; this is the head size of every published LLaMA-2.
_HEAD_DIM = 128


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


# LlamaForCausalLM.
LLAMA = Table(rules=llama_rules("model.", "lm_head"), dropped=CACHES)


def infer_llama(shapes: Shapes, num_heads: int | None = None) -> LlamaConfig:
    """From the shapes of a `Llama`, as LLaMA-2 where they do not tell."""
    vocab_size, width = shapes["embed.embedding"]
    layers, _, ffn_dim = shapes["layers.mlp.gate.kernel"]
    count = heads(width, _HEAD_DIM, num_heads, "the language model")
    return LlamaConfig(
        vocab_size=vocab_size,
        width=width,
        num_layers=layers,
        num_heads=count,
        num_kv_heads=shapes["layers.attention.key.kernel"][2] * count // width,
        ffn_dim=ffn_dim,
        tied="head.kernel" not in shapes,
    )


_FIELDS = {
    **BLOCKS,
    "vocab_size": "vocab_size",
    "num_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "rope_base": "rope_theta",
    "max_length": "max_position_embeddings",
    "tied": "tie_word_embeddings",
}
# transformers' defaults, where they are not ours.
_BASE = LlamaConfig(vocab_size=32000, norm_eps=1e-6, max_length=2048)


def read_llama(values: Json, where: str) -> LlamaConfig:
    """From a LlamaConfig."""
    only(values, where, hidden_act="silu", attention_bias=False, mlp_bias=False)
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ConversionError(f"{where}: rotary positions are scaled ({rope}), which is not implemented")
    fields = read_fields({"rope_theta": rope.get("rope_theta", 10000.0), **values}, _FIELDS, _BASE)
    if "num_key_value_heads" not in values:
        fields["num_kv_heads"] = fields["num_heads"]
    only(values, where, head_dim=fields["width"] // fields["num_heads"])
    return LlamaConfig(**fields)


def llama_json(config: LlamaConfig) -> Json:
    """`config.json` of a LlamaForCausalLM."""
    values = {"hidden_act": "silu", **write_fields(config, _FIELDS)}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **values}


def with_vocabulary(config: LlamaConfig, rows: int) -> LlamaConfig:
    """The model with the first `rows` tokens only.

    Raises:
        ConversionError: it has not so many.
    """
    if not 0 < rows <= config.vocab_size:
        raise ConversionError(f"vocab_size {rows} must be within [1, {config.vocab_size}]")
    return dataclasses.replace(config, vocab_size=rows)


def random_ids(config: LlamaConfig) -> np.ndarray:
    """Two texts of eight tokens, none of them special."""
    return np.random.default_rng(0).integers(3, min(config.vocab_size, 32000) - 1, (2, 8))


def _verify(folder, model: Llama) -> list[Difference]:
    ids = random_ids(model.config)
    logits = nnx.jit(lambda model, ids: model.logits(model(model.embed(ids))[0]))(model, ids)
    return verify_transformers(folder, {"input_ids": ids}, {"logits": logits})


FAMILY = Family(
    model=Llama,
    config=LlamaConfig,
    formats=lambda: (Format("LLaMA", (r"^model\.embed_tokens", r"mlp\.gate_proj"), LLAMA),),
    infer=infer_llama,
    read_json=read_llama,
    written_as="transformers",
    write=folder_writer(lambda _: LLAMA, llama_json, rows=lambda config: config.vocab_size),
    verify=_verify,
    with_vocabulary=with_vocabulary,
)
