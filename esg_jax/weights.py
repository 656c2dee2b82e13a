"""Portable weights: one safetensors file with the parameters and, in its metadata, the model's configuration."""

import importlib
import importlib.resources
import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from esg_jax.config import TYPE_KEY, from_dict, to_dict
from esg_jax.systems import SYSTEMS

_FORMAT = "esg_jax"
# Parts of systems that have files of their own: configuration class -> where it is defined, together with its model.
_PARTS = {
    "LlavaConfig": ("esg_jax.models.language.llava", "Llava"),
    "LlamaConfig": ("esg_jax.models.language.llama", "Llama"),
    "ClipConfig": ("esg_jax.models.language.clip", "Clip"),
    "ClipVisionConfig": ("esg_jax.models.language.clip", "ClipVision"),
    "ClipTextConfig": ("esg_jax.models.language.clip", "ClipText"),
}


def packaged_weights(name: str, otherwise: str) -> Path:
    """A weights file that ships with the package.

    Args:
        name: of the file.
        otherwise: what to do without it, for the message.

    Raises:
        FileNotFoundError: this installation has none.
    """
    path = Path(str(importlib.resources.files("esg_jax").joinpath("assets", name)))
    if not path.is_file():
        raise FileNotFoundError(f"no demo weights at {path}; {otherwise}")
    return path


def demo_checkpoint() -> Path:
    """The CropFormer that ships with the package.

    Raises:
        FileNotFoundError: this installation has none.
    """
    return packaged_weights(
        "demo.safetensors",
        "name a checkpoint (--checkpoint FILE.safetensors), convert a published one (`esg convert --help`), or train a "
        "small one (configs/demo.py)",
    )


def named_arrays(model: nnx.Module) -> dict[str, Any]:
    """Dotted path -> array of everything a checkpoint must hold (parameters and frozen statistics)."""
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): variable.get_value() for path, variable in flat}


def save_weights(
    path: str | Path, model: nnx.Module, info: dict[str, Any] | None = None, dtype=np.float32, leave_out: str = ""
) -> None:
    """Writes the model to `path`.

    Args:
        path: target `.safetensors` file; its folder must exist.
        model: of a system, or a part with a configuration of its own, with arrays fully addressable from this process.
        info: facts for the reader (steps, data, scores); stored as JSON in the metadata.
        dtype: type of the stored floating-point arrays; float16 halves the file.
        leave_out: pattern of names that are not stored, because they come from elsewhere unchanged: a frozen language
            model. `load_model` then needs them.
    """
    arrays = {}
    for name, value in named_arrays(model).items():
        if leave_out and re.search(leave_out, name):
            continue
        value = np.asarray(jax.device_get(value))
        value = value.astype(dtype) if value.dtype.kind == "f" else value
        arrays[name] = np.ascontiguousarray(value).reshape(value.shape)  # the former gives scalars an axis
    metadata = file_metadata(model.config, info) | {"left_out": leave_out}
    temporary = Path(path).with_suffix(".partial")
    save_file(arrays, temporary, metadata)
    temporary.replace(path)


def file_metadata(config: Any, info: dict[str, Any] | None = None) -> dict[str, str]:
    """What a weights file stores beside the arrays."""
    return {"format": _FORMAT, "config": json.dumps(to_dict(config)), "info": json.dumps(info or {})}


def is_weights_file(path: str | Path) -> bool:
    """Whether `path` is a file written by `save_weights`."""
    try:
        with safe_open(path, framework="numpy") as file:
            return (file.metadata() or {}).get("format") == _FORMAT
    except (SafetensorError, OSError):
        return False


def config_from_dict(values: dict[str, Any], where: str) -> tuple[Any, type[nnx.Module]]:
    """The model configuration in a dictionary of `esg_jax.config.to_dict`, and the model's class.

    Raises:
        ValueError: no model has such a configuration; `where` names the source in the message.
    """
    systems = {system.config.__name__: system for system in SYSTEMS}
    kind = values.get(TYPE_KEY, next(iter(systems)))  # the first files named no type
    if kind in systems:
        return from_dict(systems[kind].config, values, where), systems[kind].module
    if kind not in _PARTS:
        raise ValueError(f"{where}.{TYPE_KEY} is {kind!r}; choose one of {', '.join([*systems, *_PARTS])}")
    name, model = _PARTS[kind]
    module = importlib.import_module(name)
    return from_dict(getattr(module, kind), values, where), getattr(module, model)


def read_info(path: str | Path) -> tuple[Any, dict[str, Any]]:
    """The model configuration and the facts stored by `save_weights`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a safetensors file written by `save_weights`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path} holds no esg_jax model (no configuration in it); convert it with `esg convert`")
    config, _ = config_from_dict(json.loads(metadata["config"]), "model")
    return config, json.loads(metadata["info"])


def load_model(
    path: str | Path,
    *,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    given: Mapping[str, Any] | None = None,
    shardings: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None,
) -> nnx.Module:
    """Builds the model described in `path` and fills in its weights.

    Args:
        path: a file written by `save_weights`.
        dtype: type of the computation.
        param_dtype: type the floating-point arrays are converted to.
        given: the arrays by name that `save_weights` was told to leave out.
        shardings: name and shape -> where the array lies, such as `esg_jax.sharding.Layout`. Every device then reads
            its own part of the file, and no array is whole anywhere.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not our file, or its names or shapes do not fit the model it describes.
    """
    config, _ = read_info(path)
    given = given or {}
    _, cls = config_from_dict(to_dict(config), "model")
    model = nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=param_dtype))
    with safe_open(path, framework="numpy") as file:
        stored = set(file.keys())
        names = stored | set(given)
        wanted = named_arrays(model)
        left_out = (file.metadata() or {}).get("left_out", "")
        if left_out and any(re.search(left_out, name) and name not in names for name in wanted):
            raise ValueError(
                f"{path} was saved without the weights {left_out!r}; they must be given from where they came"
            )
        if names != set(wanted):
            odd = sorted(names ^ set(wanted))
            raise ValueError(f"{path} does not fit its configuration; names on one side only: {', '.join(odd[:5])}")
        graph, state = nnx.split(model)
        flat = dict(nnx.to_flat_state(state))
        for keys, variable in flat.items():
            name = ".".join(map(str, keys))
            value, target = _Slices(file, name) if name in stored else given[name], wanted[name]
            if tuple(value.shape) != target.shape:
                raise ValueError(f"{path}: {name} has shape {tuple(value.shape)}, the model needs {target.shape}")
            if shardings is None:
                array = jnp.asarray(value[...], target.dtype)
            else:
                part = partial(_part, value, dtype=target.dtype)
                array = jax.make_array_from_callback(target.shape, shardings(name, target.shape), part)
            flat[keys] = variable.replace(array)
    return nnx.merge(graph, nnx.from_flat_state(flat))


class _Slices:
    """A stored tensor; indexing reads that part of the file."""

    def __init__(self, file: Any, name: str):
        self._file, self._name = file, name
        self.shape = tuple(file.get_slice(name).get_shape())

    def __getitem__(self, index: Any) -> np.ndarray:
        whole = index is ... or not self.shape
        return self._file.get_tensor(self._name) if whole else self._file.get_slice(self._name)[index]


def _part(value: Any, index: tuple[slice, ...], *, dtype: Any) -> np.ndarray:
    return np.asarray(value[index]).astype(dtype)
