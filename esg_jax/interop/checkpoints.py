"""Whole checkpoints: PyTorch files to models and back. What a checkpoint is, `families` know."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from esg_jax.interop.convert import (
    CONFIG_KEY,
    ConversionError,
    Report,
    Stacked,
    load_into,
    our_shapes,
    plan,
    stream_to_ours,
    subset,
    targets_of,
)
from esg_jax.interop.families import FAMILIES, detect, written_family
from esg_jax.interop.families.family import BackboneFamily, Family, Format
from esg_jax.interop.readers import CheckpointReader, open_checkpoint
from esg_jax.interop.rules import Table, fill
from esg_jax.interop.writers import write_safetensors
from esg_jax.weights import config_from_dict, file_metadata


def config_of(reader: CheckpointReader, family: Family, form: Format, num_heads: int | None = None) -> Any:
    """The model configuration of a whole checkpoint: stored by us, from config.json beside it, or from its shapes.

    Raises:
        ConversionError: the sizes do not show.
    """
    if CONFIG_KEY in reader.metadata:
        return config_from_dict(json.loads(reader.metadata[CONFIG_KEY]), "model")[0]
    path = reader.path.parent / "config.json"
    if family.read_json and path.is_file():
        try:
            values = json.loads(path.read_text())
        except ValueError as error:
            raise ConversionError(f"{path} is not JSON: {error}") from error
        return family.read_json(values, str(path))
    try:
        return family.infer(our_shapes(reader, form.table), num_heads)
    except KeyError as error:
        raise ConversionError(f"{reader.path} has nothing for our {error.args[0]}, so its sizes are unknown") from error


def family_of(source: str | Path | CheckpointReader) -> Family:
    """What a whole checkpoint is, from its names alone.

    Raises:
        FileNotFoundError: no such file.
        ConversionError: the checkpoint holds no whole model.
    """
    return _whole(source, None)[1]


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
    """A model with the weights of a PyTorch checkpoint.

    Host memory holds one tensor at a time when there are `shardings` or an accelerator.

    Args:
        source: file, index or folder (see `open_checkpoint`), or a reader that is open already.
        config: configuration of the model to build; by default the one the checkpoint describes. A vocabulary may be
            larger than the checkpoint's: new rows are the mean of the others.
        vision: the checkpoint of a part that the source lacks: CLIP's, for LLaVA's original files.
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
    reader, family, form = _whole(source, vision)
    config = config or config_of(reader, family, form, num_heads)

    def create():
        return family.model(config, rngs=nnx.Rngs(seed), dtype=dtype, param_dtype=param_dtype)

    report = Report()
    model = create() if allow_missing else nnx.eval_shape(create)
    arrays = stream_to_ours(
        reader, targets_of(model), form.table, allow_missing=allow_missing, allow_unused=allow_unused, report=report
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
    reader, family, form = _whole(source, vision)
    config = config or config_of(reader, family, form, num_heads)
    targets = targets_of(nnx.eval_shape(lambda: family.model(config, rngs=nnx.Rngs(0))))
    # Of the stored type from the start, so that no tensor is in memory twice.
    dtypes = {n: np.dtype(dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype) for n, x in targets.items()}
    targets = {name: jax.ShapeDtypeStruct(x.shape, dtypes[name]) for name, x in targets.items()}
    report = Report()
    arrays = stream_to_ours(reader, targets, form.table, allow_unused=allow_unused, report=report)
    layout = {name: (x.shape, dtypes[name]) for name, x in targets.items()}
    write_safetensors(target, layout, arrays, file_metadata(config, {"source": reader.path.name}))
    return report


def _whole(source: str | Path | CheckpointReader, other: str | Path | None) -> tuple[CheckpointReader, Family, Format]:
    reader = _reader(source)
    family, form = detect(reader)
    if isinstance(family, BackboneFamily):
        raise ConversionError(f"{reader.path} holds only a backbone ({form.name})")
    if other is not None:
        if family.complete is None:
            raise ConversionError(f"{reader.path} ({form.name}) needs no checkpoint of CLIP beside it")
        other = _reader(other)
        reader = family.complete(reader, other, detect(other)[0])
    return reader, family, form


def _reader(source: str | Path | CheckpointReader) -> CheckpointReader:
    if isinstance(source, CheckpointReader):
        return source
    opened = (family.open(Path(source)) for family in FAMILIES if family.open)
    return next((reader for reader in opened if reader is not None), None) or open_checkpoint(source)


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
    allow_unused: str | None = None,
    shardings: Callable[[str, tuple[int, ...]], Any] | None = None,
) -> tuple[nnx.Module, Report]:
    """A backbone with pretrained weights, or a part of a model with those of a larger one, GELLA's with LLaVA's.

    The norms of a backbone's four outputs, which classifiers do not have, keep their values.

    Args:
        module: a backbone, a whole model or one of its parts that `families` name, such as `ClipVision`, `Projector`,
            `Llama`; concrete or abstract; it is not changed. The vocabulary of a `Llama` may be larger than the
            checkpoint's, see `load_checkpoint`.
        source: any checkpoint (see `open_checkpoint`), or a reader that is open already.
        allow_unused: regular expression of their tensors that are ignored.
        shardings: name within the part and shape -> sharding; parameters go straight to their devices.

    Raises:
        FileNotFoundError: no such file.
        ConversionError: the checkpoint has no such part, or names or shapes do not fit.
    """
    reader = _reader(source)
    family, form = detect(reader)
    prefix = "" if isinstance(module, family.model) else family.parts.get(type(module))
    if prefix is None:
        raise ConversionError(f"{reader.path} ({form.name}) holds no {type(module).__name__}")
    targets = {prefix + name: x for name, x in targets_of(module).items()}
    report = Report()
    arrays = stream_to_ours(
        _below(reader, form.table, prefix),
        targets,
        form.table,
        allow_missing=form.absent,
        allow_unused=allow_unused,
        report=report,
    )
    named = ((name.removeprefix(prefix), array) for name, array in arrays)
    return load_into(module, _placed(named, shardings)), report


def _below(reader: CheckpointReader, table: Table, prefix: str) -> CheckpointReader:
    """The reader without the tensors that belong to other parts."""
    if not prefix:
        return reader
    groups, _, _ = plan(list(reader), table)
    others = {
        name
        for (rule, values), parts in groups.items()
        if not any(fill(template, dict(values)).startswith(prefix) for template in rule.ours)
        for name in parts.values()
    }
    return reader.only(name for name in reader if name not in others)


def save_arrays(
    path: str | Path,
    arrays: Mapping[str, Any],
    config: Any,
    written_as: str | None = None,
    *,
    vocab_size: int | None = None,
    leave_out: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> list[Path]:
    """Writes a model for PyTorch, one tensor at a time.

    Args:
        path: for ``reference`` a file, whose ending (.pth or .safetensors) chooses the kind; for the others a folder,
            which gets safetensors and config.json.
        arrays: our name -> array, from `targets_of` or a `CheckpointReader` of a weights file of ours.
        config: the model's configuration.
        written_as: the family's name: ``reference``, ``transformers``, ``original`` (LLaVA's own repository); by
            default the first that the model has.
        vocab_size: write only so many rows of a language model's embedding and head; LLaVA's own files have 32000.
        leave_out: regular expression of our arrays that are not written, for example ``^vision`` for LLaVA's own files.
        max_shard_bytes: size of a shard.

    Returns:
        The files written.

    Raises:
        ConversionError: a family that the model is not written as, or a model it has no place for.
    """
    family = written_family(config, written_as)
    if vocab_size is not None:
        if family.with_vocabulary is None:
            raise ConversionError(f"vocab_size is for language models, not for a {type(config).__name__}")
        config = family.with_vocabulary(config, vocab_size)
    if leave_out is not None:
        arrays = subset(arrays, [name for name in arrays if not re.search(leave_out, name)])
    return family.write(Path(path), arrays, config, max_shard_bytes)


def save_checkpoint(path: str | Path, model: nnx.Module, written_as: str | None = None) -> list[Path]:
    """`save_arrays` for a model whose arrays are fully addressable from this process."""
    return save_arrays(path, host_arrays(model), model.config, written_as)


def host_arrays(model: nnx.Module) -> dict[str, np.ndarray]:
    """Our name -> array in host memory."""
    return {name: np.asarray(jax.device_get(value)) for name, value in targets_of(model).items()}
