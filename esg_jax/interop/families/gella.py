"""GELLA in PyTorch. There is no original, so these names are the reference; `interop/pytorch/gella.py` has the modules.

An exported GELLA is a folder: its own modules in `gella.safetensors`, the language model in `llm/` and CLIP in `clip/`
as transformers writes them. In this table the names of the latter two carry the folder as prefix.
"""

import dataclasses
import functools
import json
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from esg_jax.config import to_dict
from esg_jax.interop.convert import (
    CONFIG_KEY,
    ConversionError,
    empty_like,
    load_into,
    stream_from_ours,
    subset,
    targets_of,
)
from esg_jax.interop.families.backbones import BACKBONES
from esg_jax.interop.families.clip import CLIP_VISION, clip_vision_json
from esg_jax.interop.families.cropformer import HEADS, backbone_table
from esg_jax.interop.families.family import Family, Format, write_folder
from esg_jax.interop.families.llama import LLAMA, llama_json
from esg_jax.interop.readers import CheckpointReader, open_checkpoint
from esg_jax.interop.rules import Table, conv, linear, norm, packed_attention, pointwise, same
from esg_jax.interop.verify import Difference, compare
from esg_jax.interop.writers import write_safetensors
from esg_jax.models.gella import Gella, GellaConfig
from esg_jax.models.gella.entity_encoder import EntityEncoderConfig
from esg_jax.models.language.llama import Llama
from esg_jax.models.language.lora import Lora, merge

_OWN_FILE = "gella.safetensors"
_CLIP, _LLM = "clip.", "llm."
_LEVEL = "resoblend.levels.{i}"

_OWN = Table(
    rules=(
        *linear("projector.fc1", "projector.fc1"),
        *linear("projector.fc2", "projector.fc2"),
        *linear("association.text_proj.{i*2}", "association.text_proj.layers.{i}"),  # ReLU between
        *linear("association.entity_proj.{i*2}", "association.entity_proj.layers.{i}"),
        *same("association.log_scale", "association.log_scale"),
        *same("association.bias", "association.bias"),
    )
)
_RESOBLEND = Table(
    rules=(
        *linear("resoblend.image_proj", "resoblend.image_proj"),
        *packed_attention("resoblend.self_attention.self_attn", "resoblend.self_attention.attention"),
        *norm("resoblend.self_attention.norm", "resoblend.self_attention.norm"),
        *pointwise(f"{_LEVEL}.lateral.0", f"{_LEVEL}.lateral.conv", bias=True),
        *norm(f"{_LEVEL}.lateral.1", f"{_LEVEL}.lateral.norm"),
        *same(f"{_LEVEL}.level_embed", f"{_LEVEL}.level_embed"),
        *packed_attention(f"{_LEVEL}.cross", f"{_LEVEL}.cross"),
        *norm(f"{_LEVEL}.cross_norm", f"{_LEVEL}.cross_norm"),
        *linear(f"{_LEVEL}.ffn.{{j*2}}", f"{_LEVEL}.ffn.layers.{{j}}"),
        *conv(f"{_LEVEL}.conv", f"{_LEVEL}.conv", bias=True),
        *norm(f"{_LEVEL}.conv_norm", f"{_LEVEL}.conv_norm"),
    )
)
_VISUAL, _ENTITIES = "visual.", "visual.entity_encoder."


def gella_table(config: GellaConfig | None = None) -> Table:
    """All names, with those of the backbones of a configuration, or for reading of any.

    The first rule that fits a name is taken, so alternatives for the same place may stand side by side.
    """
    colormap = image = [family.config for family in BACKBONES if family.reference]
    if config is not None:
        colormap, image = [type(config.entities.colormap_encoder)], [] if config.clip else [type(config.vision)]
    return functools.reduce(
        operator.add,
        (
            _OWN,
            _RESOBLEND.prefixed("", _ENTITIES),
            *(backbone_table(name, "colormap_encoder.", f"{_ENTITIES}colormap_encoder.") for name in colormap),
            HEADS.prefixed("", _ENTITIES),
            *(backbone_table(name, "image_encoder.", f"{_VISUAL}image_encoder.") for name in image),
            CLIP_VISION.prefixed("clip.", f"{_VISUAL}image_encoder."),
            LLAMA.prefixed("llm.", "llm."),
        ),
    )


def _not_in_shapes(*_: Any) -> Any:
    raise ConversionError("the sizes of a GELLA do not show in its shapes: give a configuration (--config)")


def _merged(arrays: Mapping[str, Any], config: GellaConfig) -> Mapping[str, Any]:
    """The arrays with the low-rank adapters as a part of the language model."""
    dtype = empty_like(arrays)["llm.embed.embedding"].dtype
    parts = {
        "llm.": lambda: Llama(config.llm, rngs=nnx.Rngs(0), param_dtype=dtype),
        "lora.": lambda: Lora(config.lora, config.llm, rngs=nnx.Rngs(0)),
    }
    llm, lora = (
        load_into(nnx.eval_shape(make), {n.removeprefix(prefix): arrays[n] for n in arrays if n.startswith(prefix)})
        for prefix, make in parts.items()
    )
    others = {name: arrays[name] for name in arrays if not name.startswith(tuple(parts))}
    return others | {f"llm.{name}": np.asarray(x) for name, x in targets_of(merge(llm, lora)).items()}


def _write(folder: Path, arrays: Mapping[str, Any], config: GellaConfig, max_shard_bytes: int) -> list[Path]:
    """`gella.safetensors`, `llm/` (a LlamaForCausalLM) and, with CLIP, `clip/` (a CLIPVisionModel)."""
    if type(config.entities) is not EntityEncoderConfig:
        kind = type(config.entities).__name__
        raise ConversionError(f"there are no PyTorch modules for GELLA with {kind}, only for colormaps")
    if config.entities.key_padding or config.pad_position != "bottom_right":
        raise ConversionError("the PyTorch modules of GELLA know no key_padding and no pad_position but bottom_right")
    if config.vision_stride != 32 or config.token_pooling != 1 or config.noun_blocks is not None:
        raise ConversionError("the PyTorch modules of GELLA know no vision_stride 16, token_pooling and noun_blocks")
    if config.lora is not None:
        arrays, config = _merged(arrays, config), dataclasses.replace(config, lora=None)
    table, left, written = gella_table(config), set(arrays), []
    parts = {_LLM: ("llm.", llama_json, config.llm)}
    if config.clip:
        parts[_CLIP] = (f"{_VISUAL}image_encoder.", clip_vision_json, config.vision)
    for prefix, (ours, values, sizes) in parts.items():
        names = [name for name in arrays if name.startswith(ours)]
        if names:
            target = folder / prefix.removesuffix(".")
            written += write_folder(target, subset(arrays, names), table, values(sizes), max_shard_bytes, prefix=prefix)
            left -= set(names)
    own = subset(arrays, [name for name in arrays if name in left])
    folder.mkdir(parents=True, exist_ok=True)
    layout = {name: (x.shape, x.dtype) for name, x in stream_from_ours(empty_like(own), table)}
    metadata = {"format": "pt", CONFIG_KEY: json.dumps(to_dict(config))}
    write_safetensors(folder / _OWN_FILE, layout, stream_from_ours(own, table), metadata)
    return [*written, folder / _OWN_FILE]


def _open(folder: Path) -> CheckpointReader | None:
    """The tensors of such a folder, those of `llm/` and `clip/` with the folder as prefix."""
    if not (folder / _OWN_FILE).is_file():
        return None
    reader = open_checkpoint(folder / _OWN_FILE)
    for prefix in (_LLM, _CLIP):
        part = folder / prefix.removesuffix(".")
        if part.is_dir():
            other = open_checkpoint(part)
            reader = reader.joined({prefix + name: name for name in other}, other)
    return reader


def verify(folder: Path, model: Gella) -> list[Difference]:
    """Compares a GELLA with PyTorch's, loaded from `folder`, in float32 on random input.

    Args:
        folder: what was written.
        model: ours.

    Raises:
        ModuleNotFoundError: torch or transformers is not installed.
        ValueError, RuntimeError: the folder does not fit the network.
    """
    import torch

    from esg_jax.interop.pytorch.gella import load

    theirs = load(folder)
    config, rng = model.config, np.random.default_rng(0)
    side = config.image_size
    image = rng.integers(0, 256, (2, side, side, 3), np.uint8)
    size = np.array([[side, side], [side, side // 2]], np.int32)
    colors = rng.integers(0, 256, (2, 4, 4, 3)).astype(np.float32)
    colormap = colors.repeat(config.colormap.size // 4, 1).repeat(config.colormap.size // 4, 2)
    tensors = [torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for x in (image, colormap)]

    def ours(model, image, size, colormap, ids, seg_pos):
        vision = model.vision_tokens(image, size)
        output = model.visual.entity_encoder(vision, colormap, all_predictions=False)
        found = (output.masks.image.logits[-1], output.masks.image_mask_logits()[:, 0], output.embed)
        if ids is None:
            return found
        hidden = model.text(vision, ids)
        return *found, hidden, model.associate(model.noun_states(hidden, seg_pos), output.embed)

    names = ["entityness logits", "mask logits", "entity embeddings"]
    ids = seg_pos = None
    if config.llm is not None:
        names += ["text states", "association logits"]
        places = np.full((2, config.grid**2), config.image_id, np.int32)
        words = rng.integers(3, min(config.image_id, config.llm.vocab_size), (2, 12)).astype(np.int32)
        words[:, [5, 9]] = config.seg_id
        ids = np.concatenate([words[:, :3], places, words[:, 3:]], axis=1)
        seg_pos = np.tile(np.array([5, 9], np.int32) + places.shape[1], (2, 1))
    with torch.inference_mode():
        vision = theirs.vision_tokens(tensors[0], torch.from_numpy(size))
        if ids is None:
            expected = theirs.entities(vision, tensors[1])
        else:
            inputs = (tensors[0], torch.from_numpy(size), tensors[1], torch.from_numpy(ids).long())
            association, found = theirs(*inputs, torch.from_numpy(seg_pos).long())
            expected = (*found, theirs.text(vision, inputs[3]), association)
    results = nnx.jit(ours)(model, image, size, colormap, ids, seg_pos)
    return [compare(*items) for items in zip(names, results, expected, strict=True)]


FAMILY = Family(
    model=Gella,
    config=GellaConfig,
    formats=lambda: (Format("GELLA", (r"^resoblend\.", r"^colormap_encoder\."), gella_table()),),
    infer=_not_in_shapes,
    written_as="transformers",
    write=_write,
    verify=verify,
    open=_open,
)
