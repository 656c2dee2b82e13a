"""Whole checkpoints: PyTorch files to models and back."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from esg_jax.config import to_dict
from esg_jax.interop import language_config, language_tables
from esg_jax.interop.convert import (
    ConversionError,
    Report,
    Stacked,
    load_into,
    plan,
    stream_from_ours,
    stream_to_ours,
    targets_of,
)
from esg_jax.interop.cropformer_tables import reference_table, transformers_table
from esg_jax.interop.formats import Format, detect, our_shapes
from esg_jax.interop.gella_checkpoints import OWN_FILE, open_gella, save_gella
from esg_jax.interop.readers import CheckpointReader, open_checkpoint
from esg_jax.interop.rules import Table, fill
from esg_jax.interop.transformers_config import mask2former_config
from esg_jax.interop.writers import write_pth, write_safetensors, write_sharded
from esg_jax.models import lora
from esg_jax.models.backbones.mobilenet_v2 import MobileNetV2, MobileNetV2Config
from esg_jax.models.backbones.resnet import ResNet, ResNetConfig
from esg_jax.models.backbones.swin import Swin, SwinConfig
from esg_jax.models.clip import ClipConfig, ClipTextConfig, ClipVisionConfig
from esg_jax.models.cropformer import CropFormer
from esg_jax.models.gella import Gella, GellaConfig
from esg_jax.models.llama import Llama, LlamaConfig
from esg_jax.models.llava import LlavaConfig
from esg_jax.weights import config_from_dict, file_metadata

CONFIG_KEY = "esg_jax_config"
_BACKBONES = {SwinConfig: Swin, ResNetConfig: ResNet, MobileNetV2Config: MobileNetV2}


def config_of(reader: CheckpointReader, found: Format, num_heads: int | None = None) -> Any:
    """The model configuration of a whole checkpoint: stored by us, from config.json beside it, or from its shapes.

    Raises:
        ConversionError: the sizes do not show.
    """
    if CONFIG_KEY in reader.metadata:
        return config_from_dict(json.loads(reader.metadata[CONFIG_KEY]), "model")[0]
    folder_config = reader.path.parent / "config.json"
    if found.read_config and folder_config.is_file():
        return found.read_config(folder_config)
    try:
        return found.infer(our_shapes(reader, found.table), num_heads)
    except KeyError as error:
        raise ConversionError(f"{reader.path} has nothing for our {error.args[0]}, so its sizes are unknown") from error


def load_checkpoint(
    source: str | Path | CheckpointReader,
    *,
    config: Any = None,
    vision: str | Path | None = None,
    num_heads: int | None = None,
    allow_missing: str | None = None,
    allow_unused: str | None = None,
    shardings: Callable[[str, tuple[int, ...]], Any] | None = None,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    seed: int = 0,
) -> tuple[nnx.Module, Report]:
    """A model with the weights of a PyTorch checkpoint: CropFormer (also for Mask2Former), Llava, Llama, Clip.

    Host memory holds one tensor at a time when there are `shardings` or an accelerator.

    Args:
        source: file, index or folder (see `open_checkpoint`), or a reader that is open already.
        config: configuration of the model to build; by default the one the checkpoint describes. A vocabulary may be
            larger than the checkpoint's: new rows are the mean of the others.
        vision: CLIP's checkpoint, for LLaVA's original files, which lack it.
        num_heads: attention heads, when neither the checkpoint nor 8 is right.
        allow_missing: regular expression of our parameters that keep their random initialisation, for example
            ``^association`` to start CropFormer from a Mask2Former.
        allow_unused: regular expression of their tensors that are ignored.
        shardings: our name and shape -> sharding, such as `esg_jax.sharding.Layout`; parameters go straight to their
            devices, one at a time.
        dtype, param_dtype: of the computation and of the parameters.
        seed: of the parameters that `allow_missing` leaves at random.

    Raises:
        FileNotFoundError: no such file.
        ConversionError: the checkpoint holds no whole model, or names or shapes do not fit.
    """
    reader, found = _whole(source, vision)
    config = config or config_of(reader, found, num_heads)

    def create():
        return found.model(config, rngs=nnx.Rngs(seed), dtype=dtype, param_dtype=param_dtype)

    report = Report()
    model = create() if allow_missing else nnx.eval_shape(create)
    arrays = stream_to_ours(
        reader,
        targets_of(model),
        found.table,
        allow_missing=allow_missing,
        allow_unused=allow_unused,
        report=report,
    )
    return load_into(model, _placed(arrays, shardings)), report


def convert_to_file(
    source: str | Path | CheckpointReader,
    target: str | Path,
    *,
    config: Any = None,
    vision: str | Path | None = None,
    num_heads: int | None = None,
    allow_unused: str | None = None,
    dtype=np.float32,
) -> Report:
    """Converts a PyTorch checkpoint to a weights file of ours, one tensor at a time.

    Args:
        source, config, vision, num_heads, allow_unused: as for `load_checkpoint`.
        target: the `.safetensors` file to write; it appears only when complete.
        dtype: of the stored floating-point arrays.

    Raises:
        FileNotFoundError: no such file.
        ConversionError: the checkpoint holds no whole model, or names or shapes do not fit.
    """
    reader, found = _whole(source, vision)
    config = config or config_of(reader, found, num_heads)
    targets = targets_of(nnx.eval_shape(lambda: found.model(config, rngs=nnx.Rngs(0))))
    # Of the stored type from the start, so that no tensor is in memory twice.
    dtypes = {n: np.dtype(dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype) for n, x in targets.items()}
    targets = {name: jax.ShapeDtypeStruct(x.shape, dtypes[name]) for name, x in targets.items()}
    report = Report()
    arrays = stream_to_ours(reader, targets, found.table, allow_unused=allow_unused, report=report)
    layout = {name: (x.shape, dtypes[name]) for name, x in targets.items()}
    write_safetensors(target, layout, arrays, file_metadata(config, {"source": reader.path.name}))
    return report


def _whole(source: str | Path | CheckpointReader, vision: str | Path | None) -> tuple[CheckpointReader, Format]:
    if isinstance(source, CheckpointReader):
        reader = source
    elif (Path(source) / OWN_FILE).is_file():
        reader = open_gella(source)
    else:
        reader = open_checkpoint(source)
    found = detect(list(reader))
    if not found.whole:
        raise ConversionError(f"{reader.path} holds only a backbone ({found.name})")
    if vision is not None:
        if found.name != "LLaVA (original)":
            raise ConversionError(f"{reader.path} ({found.name}) needs no checkpoint of CLIP beside it")
        reader = _with_vision(reader, vision)
    return reader, found


_TOWER = "model.vision_tower.vision_tower."


def _with_vision(reader: CheckpointReader, path: str | Path) -> CheckpointReader:
    """LLaVA's original tensors together with those of a CLIP checkpoint."""
    if any(name.startswith(_TOWER) for name in reader):
        raise ConversionError(f"{reader.path} holds its own CLIP")
    clip = open_checkpoint(path)
    found = detect(list(clip))
    prefixes = {"CLIP": ("vision_model.",), "CLIP image side": ("",)}
    if found.name not in prefixes:
        raise ConversionError(f"{path} is a checkpoint of {found.name}, not of CLIP's image side")
    names = [name for name in clip if name.startswith(prefixes[found.name]) and name != "visual_projection.weight"]
    return reader.joined({_TOWER + name: name for name in names}, clip)


def _placed(arrays: Iterator[tuple[str, Any]], shardings: Callable[[str, tuple[int, ...]], Any] | None):
    for name, array in arrays:
        sharding = shardings(name, array.shape) if shardings else None
        if not isinstance(array, Stacked):
            yield name, jax.device_put(array, sharding) if shardings else array
        elif shardings or jax.default_backend() != "cpu":
            yield name, _stacked_on_devices(array, sharding)
        else:
            yield name, np.asarray(array)


def _stacked_on_devices(stack: Stacked, sharding: Any) -> jax.Array:
    """Puts layer after layer into an array that lies on the devices from the start."""
    piece = sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        piece = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[1:]))
    out = jax.jit(lambda: jnp.zeros(stack.shape, stack.dtype), out_shardings=sharding)()
    put = jax.jit(jax.lax.dynamic_update_index_in_dim, static_argnums=3, donate_argnums=0, out_shardings=sharding)
    for index, layer in enumerate(stack):
        out = put(out, jax.device_put(layer, piece), index, 0)
    return out


def load_part(
    module: nnx.Module,
    source: str | Path | CheckpointReader,
    *,
    shardings: Callable[[str, tuple[int, ...]], Any] | None = None,
) -> tuple[nnx.Module, Report]:
    """A part of a model with the weights that a checkpoint holds for such a part, for example GELLA's from LLaVA's.

    Args:
        module: a `ClipVision`, `ClipText`, `Projector` or `Llama`, concrete or abstract; it is not changed. The
            vocabulary of a `Llama` may be larger than the checkpoint's, see `load_checkpoint`.
        source: LLaVA, LLaMA or CLIP in any format (see `open_checkpoint`), or a reader that is open already.
        shardings: name within the part and shape -> sharding; parameters go straight to their devices.

    Raises:
        FileNotFoundError: no such file.
        ConversionError: the checkpoint has no such part, or names or shapes do not fit.
    """
    reader = source if isinstance(source, CheckpointReader) else open_checkpoint(source)
    found = detect(list(reader))
    prefixes = language_tables.PARTS.get(found.model, {})
    prefix = "" if isinstance(module, found.model or ()) else prefixes.get(type(module))
    if prefix is None:
        raise ConversionError(f"{reader.path} ({found.name}) holds no {type(module).__name__}")
    targets = {prefix + name: x for name, x in targets_of(module).items()}
    report = Report()
    arrays = stream_to_ours(_below(reader, found.table, prefix), targets, found.table, report=report)
    named = ((name.removeprefix(prefix), array) for name, array in arrays)
    return load_into(module, _placed(named, shardings)), report


def _below(reader: CheckpointReader, table: Table, prefix: str) -> CheckpointReader:
    """The reader without the tensors that belong to other parts."""
    groups, _, _ = plan(list(reader), table)
    others = {
        name
        for (rule, values), parts in groups.items()
        if not any(fill(template, dict(values)).startswith(prefix) for template in rule.ours)
        for name in parts.values()
    }
    return reader.only(name for name in reader if name not in others)


def with_new_tokens(llm: Llama, ids: tuple[int, ...], known: int = 32000) -> Llama:
    """The model with the rows of new tokens, in embedding and head, set to the mean of the first `known` rows.

    transformers' LLaVA files have spare rows whose content means nothing, so `<SEG>` needs this before training.
    The model is not changed.

    Raises:
        ValueError: an id that is among the known ones or outside the vocabulary.
    """
    wrong = [i for i in ids if not known <= i < llm.config.vocab_size]
    if wrong:
        raise ValueError(f"token ids {wrong} must be within [{known}, {llm.config.vocab_size - 1}]")
    llm = nnx.clone(llm)
    rows = np.array(ids)
    for parameter, axis in [(llm.embed.embedding, 0)] + ([] if llm.config.tied else [(llm.head.kernel, 1)]):
        value = parameter[...]
        mean = jax.lax.slice_in_dim(value, 0, known, axis=axis).mean(axis, dtype=jnp.float32).astype(value.dtype)
        parameter[...] = value.at[rows].set(mean) if axis == 0 else value.at[:, rows].set(mean[:, None])
    return llm


def load_backbone(
    backbone: nnx.Module, path: str | Path, *, allow_unused: str | None = None
) -> tuple[nnx.Module, Report]:
    """The backbone with pretrained weights from `path`, any of the backbone formats.

    Norms of the four outputs, which classifiers do not have, keep their values.

    Raises:
        FileNotFoundError: no such file.
        ConversionError: another architecture, or names or shapes that do not fit.
    """
    reader = open_checkpoint(path)
    found = detect(list(reader))
    expected = _BACKBONES[found.backbone]
    if found.whole or not isinstance(backbone, expected):
        raise ConversionError(f"{path} is a checkpoint of {found.name}, not of a {type(backbone).__name__} backbone")
    report = Report()
    arrays = stream_to_ours(
        reader,
        targets_of(backbone),
        found.table,
        allow_missing=found.absent,
        allow_unused=allow_unused,
        report=report,
    )
    return load_into(backbone, arrays), report


# Configuration of a language model -> what is written for each format: (table, config.json).
_LANGUAGE_LAYOUTS = {
    "transformers": {
        LlavaConfig: (lambda _: language_tables.LLAVA, language_config.llava_json),
        LlamaConfig: (lambda _: language_tables.LLAMA, language_config.llama_json),
        ClipConfig: (lambda _: language_tables.CLIP, language_config.clip_json),
        ClipVisionConfig: (lambda _: language_tables.CLIP_VISION, language_config.clip_vision_json),
        ClipTextConfig: (lambda _: language_tables.CLIP_TEXT, language_config.clip_text_json),
    },
    "original": {
        LlavaConfig: (
            lambda config: language_tables.llava_original_table(config.projector),
            language_config.llava_original_json,
        ),
    },
}


def save_language(
    folder: str | Path,
    arrays: Mapping[str, Any],
    config: Any,
    format: str = "transformers",
    *,
    vocab_size: int | None = None,
    leave_out: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> list[Path]:
    """Writes a LLaVA, LLaMA, CLIP or GELLA (see `save_gella`) for PyTorch, one tensor at a time.

    Args:
        folder: gets safetensors, in shards with an index when they are large, and config.json.
        arrays: our name -> array, from `targets_of` or a `CheckpointReader` of a weights file of ours.
        config: the model's configuration.
        format: ``transformers`` (its on-disk names) or ``original`` (LLaVA's own repository).
        vocab_size: write only so many rows of embedding and head; LLaVA's own files have 32000.
        leave_out: regular expression of our arrays that are not written, for example ``^vision`` for LLaVA's own files.
        max_shard_bytes: size of a shard.

    Returns:
        The files written.

    Raises:
        ConversionError: an unknown format, or a model it has no place for.
    """
    if isinstance(config, GellaConfig):
        if format != "transformers" or vocab_size is not None or leave_out is not None:
            raise ConversionError("a GELLA is written whole, in the format transformers")
        if config.lora is not None:
            raise ConversionError("the GELLA has low-rank adapters; merge them first (`merged`)")
        return save_gella(folder, arrays, config, CONFIG_KEY, max_shard_bytes)
    layouts = _LANGUAGE_LAYOUTS.get(format, {})
    if type(config) not in layouts:
        fitting = ", ".join(name for name, known in _LANGUAGE_LAYOUTS.items() if type(config) in known)
        raise ConversionError(f"no format {format!r} for a {type(config).__name__}; choose {fitting}")
    make_table, make_json = layouts[type(config)]
    if vocab_size is not None:
        llm = config if isinstance(config, LlamaConfig) else config.llm
        if not 0 < vocab_size <= llm.vocab_size:
            raise ConversionError(f"vocab_size {vocab_size} must be within [1, {llm.vocab_size}]")
        llm = dataclasses.replace(llm, vocab_size=vocab_size)
        config = llm if isinstance(config, LlamaConfig) else dataclasses.replace(config, llm=llm)
    values = make_json(config)
    if isinstance(arrays, CheckpointReader):
        empty = {name: np.broadcast_to(np.zeros((), arrays.dtype(name)), arrays.shape(name)) for name in arrays}
    else:
        empty = {name: np.broadcast_to(np.zeros((), x.dtype), x.shape) for name, x in arrays.items()}
    dtypes = {x.dtype for x in empty.values()}
    if len(dtypes) == 1:
        values["dtype"] = dtypes.pop().name
    table = make_table(config)
    layout = {name: (x.shape, x.dtype) for name, x in _written(empty, table, vocab_size, leave_out)}
    folder = Path(folder)
    written = write_sharded(folder, layout, _written(arrays, table, vocab_size, leave_out), max_shard_bytes)
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    return [*written, folder / "config.json"]


def _written(arrays: Mapping[str, Any], table: Table, vocab_size: int | None, leave_out: str | None):
    growing = {template for rule in table.rules if rule.growing is not None for template in rule.theirs}
    skip = re.compile(leave_out) if leave_out else None
    if skip and isinstance(arrays, CheckpointReader):
        arrays = arrays.only(name for name in arrays if not skip.search(name))
    elif skip:
        arrays = {name: x for name, x in arrays.items() if not skip.search(name)}
    for name, array in stream_from_ours(arrays, table):
        yield name, array[:vocab_size] if name in growing else array


def merged(model: nnx.Module) -> nnx.Module:
    """A GELLA whose low-rank adapters have become part of the language model; any other model as it is."""
    if not isinstance(model, Gella) or model.config.lora is None:
        return model
    model = nnx.clone(model)
    model.llm, model.lora = lora.merge(model.llm, model.lora), None
    model.config = dataclasses.replace(model.config, lora=None)
    model.visual.config = model.config
    return model


def save_checkpoint(path: str | Path, model: nnx.Module, format: str | None = None) -> list[Path]:
    """Writes a model for PyTorch.

    Args:
        path: for ``reference`` a file, whose ending (.pth or .safetensors) chooses the kind; for the others a folder,
            which gets model.safetensors and config.json.
        model: with arrays fully addressable from this process.
        format: ``reference`` (default) or ``transformers`` for a CropFormer; for others see `save_language`.

    Returns:
        The files written.

    Raises:
        ValueError: an unknown format or ending, or a model the format has no place for.
    """
    path = Path(path)
    model = merged(model)
    arrays = {name: np.asarray(jax.device_get(value)) for name, value in targets_of(model).items()}
    if not isinstance(model, CropFormer):
        return save_language(path, arrays, model.config, format or "transformers")
    format = format or "reference"
    backbone = type(model.config.backbone)
    if format == "transformers":
        config = mask2former_config(model.config)
        tensors = dict(stream_from_ours(arrays, transformers_table(backbone)))
        path.mkdir(parents=True, exist_ok=True)
        # "pt" is what transformers insists on finding in the metadata.
        _write_safetensors(path / "model.safetensors", tensors, {"format": "pt"})
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        return [path / "model.safetensors", path / "config.json"]
    if format != "reference":
        raise ValueError(f"unknown format {format!r}; choose reference or transformers")
    table = reference_table(backbone, association=model.config.association is not None, reading=False)
    metadata = {CONFIG_KEY: json.dumps(to_dict(model.config))}
    if path.suffix not in (".pth", ".safetensors"):
        raise ValueError(f"{path.name}: the ending must be .pth or .safetensors")
    tensors = dict(stream_from_ours(arrays, table))
    if path.suffix == ".pth":
        write_pth(path, tensors.items(), metadata)
    else:
        _write_safetensors(path, tensors, {"format": "pt", **metadata})
    return [path]


def _write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    layout = {name: (array.shape, array.dtype) for name, array in tensors.items()}
    write_safetensors(path, layout, tensors.items(), metadata)
