"""What the `config.json` files of transformers' language models have in common."""

from collections.abc import Mapping
from typing import Any

from esg_jax.interop.convert import ConversionError
from esg_jax.interop.families.family import Json

# Our field of a transformer's sizes -> their key.
BLOCKS = {
    "width": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "ffn_dim": "intermediate_size",
}
# Tensors of old files, recomputed from the configuration by every implementation.
CACHES = (r".*rotary_emb\.inv_freq", r".*embeddings\.position_ids")


def heads(width: int, head_dim: int, num_heads: int | None, what: str) -> int:
    """The number of attention heads, which shapes do not show: as given, or of this size.

    Raises:
        ConversionError: not given, and the width is no multiple of the size.
    """
    if num_heads is None and width % head_dim:
        raise ConversionError(
            f"{what} is {width} channels wide, no multiple of {head_dim}: name its heads with --num-heads, or give a "
            "configuration"
        )
    return num_heads or width // head_dim


def only(values: Json, where: str, **needed: Any) -> None:
    """Refuses other values of these keys than the one that is implemented.

    Raises:
        ConversionError: names the key.
    """
    for key, value in needed.items():
        if values.get(key, value) != value:
            raise ConversionError(f"{where}: {key} is {values[key]!r}, only {value!r} is implemented")


def read_fields(values: Json, names: Mapping[str, str], defaults: Any) -> dict[str, Any]:
    """{our field: value} by {our field: their key}."""
    return {ours: values.get(theirs, getattr(defaults, ours)) for ours, theirs in names.items()}


def write_fields(config: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """{their key: value} by {our field: their key}."""
    return {theirs: getattr(config, ours) for ours, theirs in names.items()}
