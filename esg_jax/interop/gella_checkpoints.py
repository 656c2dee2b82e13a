"""GELLA for PyTorch and back: a folder with its own modules, its language model and its image encoder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from esg_jax.config import to_dict
from esg_jax.interop.convert import ConversionError, stream_from_ours
from esg_jax.interop.gella_tables import GELLA
from esg_jax.interop.language_config import clip_vision_json, llama_json
from esg_jax.interop.readers import CheckpointReader, open_checkpoint
from esg_jax.interop.rules import Table
from esg_jax.interop.writers import write_safetensors, write_sharded
from esg_jax.models.clip import ClipVisionConfig
from esg_jax.models.entity_encoder import EntityEncoderConfig
from esg_jax.models.gella import GellaConfig

OWN_FILE = "gella.safetensors"
_CLIP, _LLM = "clip.", "llm."


def save_gella(
    folder: str | Path,
    arrays: Mapping[str, Any],
    config: GellaConfig,
    config_key: str,
    max_shard_bytes: int = 5 * 10**9,
) -> list[Path]:
    """Writes a GELLA for PyTorch, one tensor at a time.

    Args:
        folder: gets `gella.safetensors`, `llm/` (a LlamaForCausalLM) and, with CLIP, `clip/` (a CLIPVisionModel).
        arrays: our name -> array, or a `CheckpointReader` of a weights file of ours.
        config: the model's configuration.
        config_key: under which it is stored in the metadata.
        max_shard_bytes: largest shard in `llm/`.

    Returns:
        The files written.

    Raises:
        ConversionError: a configuration that the PyTorch modules do not cover.
    """
    if not isinstance(config.entities, EntityEncoderConfig):
        kind = type(config.entities).__name__
        raise ConversionError(f"there are no PyTorch modules for GELLA with {kind}, only for colormaps")
    if config.entities.key_padding or config.pad_position != "bottom_right":
        raise ConversionError("the PyTorch modules of GELLA know no key_padding and no pad_position but bottom_right")
    if config.vision_stride != 32 or config.token_pooling != 1 or config.noun_blocks is not None:
        raise ConversionError("the PyTorch modules of GELLA know no vision_stride 16, token_pooling and noun_blocks")
    folder = Path(folder)
    parts = {
        _LLM: [name for name in arrays if name.startswith("llm.")],
        _CLIP: [name for name in arrays if name.startswith("visual.image_encoder.")],
    }
    descriptions: dict[str, dict[str, Any]] = {}
    if config.llm is not None:
        descriptions[_LLM] = llama_json(config.llm)
    if isinstance(config.vision, ClipVisionConfig):
        descriptions[_CLIP] = clip_vision_json(config.vision)
    written = []
    for prefix, values in descriptions.items():
        part = _only(arrays, parts[prefix])
        target = folder / prefix.removesuffix(".")
        layout = {name: (x.shape, x.dtype) for name, x in _without(prefix, _empty(part), GELLA)}
        written += write_sharded(target, layout, _without(prefix, part, GELLA), max_shard_bytes)
        dtypes = {np.dtype(dtype).name for _, dtype in layout.values()}
        values |= {"dtype": dtypes.pop()} if len(dtypes) == 1 else {}
        (target / "config.json").write_text(json.dumps(values, indent=2) + "\n")
        written.append(target / "config.json")
    elsewhere = {name for prefix in descriptions for name in parts[prefix]}
    own = _only(arrays, [name for name in arrays if name not in elsewhere])
    folder.mkdir(parents=True, exist_ok=True)
    layout = {name: (x.shape, x.dtype) for name, x in stream_from_ours(_empty(own), GELLA)}
    metadata = {"format": "pt", config_key: json.dumps(to_dict(config))}
    write_safetensors(folder / OWN_FILE, layout, stream_from_ours(own, GELLA), metadata)
    return [*written, folder / OWN_FILE]


def open_gella(folder: str | Path) -> CheckpointReader:
    """The tensors of such a folder, those of `llm/` and `clip/` with the folder as prefix.

    Raises:
        FileNotFoundError, ValueError: as `open_checkpoint`.
    """
    reader = open_checkpoint(Path(folder) / OWN_FILE)
    for prefix in (_LLM, _CLIP):
        part = Path(folder) / prefix.removesuffix(".")
        if part.is_dir():
            other = open_checkpoint(part)
            reader = reader.joined({prefix + name: name for name in other}, other)
    return reader


def _only(arrays: Mapping[str, Any], names: list[str]) -> Mapping[str, Any]:
    if isinstance(arrays, CheckpointReader):
        return arrays.only(names)
    return {name: arrays[name] for name in names}


def _empty(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays of the same shapes and types that take no memory."""
    if isinstance(arrays, CheckpointReader):
        return {name: np.broadcast_to(np.zeros((), arrays.dtype(name)), arrays.shape(name)) for name in arrays}
    return {name: np.broadcast_to(np.zeros((), x.dtype), x.shape) for name, x in arrays.items()}


def _without(prefix: str, arrays: Mapping[str, Any], table: Table):
    for name, array in stream_from_ours(arrays, table):
        yield name.removeprefix(prefix), array
