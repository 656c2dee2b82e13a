"""A `Grounder` from a weights file: what it needs beside the model is looked up in the file's facts."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

import esg_jax
from esg_jax import weights
from esg_jax.config import from_dict
from esg_jax.inference.grounding.decisions import GroundingConfig
from esg_jax.inference.grounding.grounder import Grounder
from esg_jax.interop.gguf import packaged_smollm2
from esg_jax.models.gella import Gella
from esg_jax.text.prompts import Prompts
from esg_jax.text.tokenizers import open_tokenizer


def load_grounder(
    path: str | Path | None = None,
    *,
    tokenizer: str | None = None,
    conversation: str | None = None,
    prompts: str | Path | None = None,
    rules: Mapping[str, Any] | None = None,
    nouns: str | None = None,
    precision: str = "float32",
    batch_size: int = 1,
    max_new_tokens: int = 256,
) -> Grounder:
    """The model with its tokenizer and wording.

    `info["grounding"]` of the weights may say `tokenizer`, `conversation`, `prompts`, `rules`, `nouns` and
    `with_count`; arguments override it.

    Args:
        path: what `esg_jax.load` reads; None: the weights of the package.
        tokenizer: file or folder for `open_tokenizer`, or "smollm2" for the packaged one.
        conversation, prompts: of `Prompts.load`.
        rules: fields of `GroundingConfig`.
        nouns: of `Grounder`; by default "rule" for weights that leave an untrained language model out.
        precision: "float32" or "bfloat16", of the computation.
        batch_size, max_new_tokens: of `Grounder`.

    Raises:
        FileNotFoundError: no such file, or no weights in the package.
        ValueError: no GELLA, no tokenizer named, an unknown rule.
    """
    path = Path(path) if path else demo_grounder()
    if not path.exists():
        raise FileNotFoundError(f"no GELLA weights at {path}")
    info = weights.read_info(path)[1] if weights.is_weights_file(path) else {}
    known = info.get("grounding", {})
    config = from_dict(GroundingConfig, {**known.get("rules", {}), **(rules or {})}, "rule")
    tokenizer = tokenizer or known.get("tokenizer")
    if not tokenizer:
        raise ValueError(f"{path} does not say which tokenizer it needs; give --tokenizer")
    words = open_tokenizer(packaged_smollm2() if tokenizer == "smollm2" else tokenizer)
    wording = Prompts.load(prompts or known.get("prompts") or None, conversation or known.get("conversation", "vicuna"))
    model = esg_jax.load(path, dtype=getattr(jnp, precision))
    if not isinstance(model, Gella):
        raise ValueError(f"{path} holds a {type(model).__name__}, expected GELLA weights")
    return Grounder(
        model,
        words,
        wording,
        config,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        # Weights that leave the language model out have it untrained: it never writes <SEG>.
        nouns=nouns or known.get("nouns", "rule" if "llm_weights" in info else "model"),
        with_count=known.get("with_count", True),
    )


def demo_grounder() -> Path:
    """The GELLA weights that ship with the package.

    Raises:
        FileNotFoundError: this installation has none.
    """
    return weights.packaged_weights(
        "gella_demo.safetensors",
        "name GELLA weights (--model FILE.safetensors), convert a published checkpoint (`esg convert --help`), or "
        "train a small one (configs/gella_quickstart.py)",
    )


def read_rules(pairs: Sequence[str], option: str) -> dict[str, Any]:
    """NAME=VALUE texts to values; numbers become numbers.

    Raises:
        ValueError: no "=" in one; names the option.
    """
    out: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{option} {pair!r}: expected NAME=VALUE")
        try:
            out[name] = json.loads(value)
        except json.JSONDecodeError:
            out[name] = value
    return out
