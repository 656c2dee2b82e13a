"""Checkpoint files of other frameworks as mappings from name to array, read one tensor at a time.

The format is recognised by content, never by extension:

* ``.pth`` of PyTorch 1.6 and later (a zip archive) and of earlier versions (a stream of pickles),
* plain pickles of numpy arrays (detectron2's model zoo ``.pkl``),
* safetensors, and index files of sharded safetensors or ``.bin`` checkpoints,
* a folder that holds any of these under the names transformers uses.
"""

import dataclasses
import functools
import io
import json
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from esg_jax.interop.restricted_pickle import RestrictedUnpickler, Storage, TensorRef, UnsafeCheckpointError, unwrap

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# What training loops nest the parameters under.
_WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
# Everything that a malformed pickle can make the unpickler raise.
_PICKLE_ERRORS = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    TypeError,
    KeyError,
    IndexError,
    ImportError,
    UnicodeDecodeError,
    OverflowError,
    RecursionError,
)


@dataclasses.dataclass(frozen=True)
class _Entry:
    """How to get one tensor, and what is known without reading it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    layer: Callable[[int], np.ndarray] | None = None


class CheckpointReader(Mapping[str, np.ndarray]):
    """Tensors of a checkpoint by name; each access reads one from disk, nothing is kept.

    Attributes:
        path: the file or folder.
        metadata: text stored with the tensors (safetensors) or beside them in the wrapper (``.pth``).
    """

    def __init__(self, path: Path, entries: Mapping[str, _Entry], metadata: Mapping[str, str] | None = None):
        self.path = path
        self.metadata = dict(metadata or {})
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._entries[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Type of a tensor, without reading it."""
        return self._entries[name].dtype

    def layer(self, name: str, index: int) -> np.ndarray:
        """`self[name][index]`; of a safetensors file nothing else is read."""
        entry = self._entries[name]
        return entry.read()[index] if entry.layer is None else entry.layer(index)

    def only(self, names: Iterable[str]) -> "CheckpointReader":
        """A reader of these tensors alone."""
        return CheckpointReader(self.path, {name: self._entries[name] for name in names}, self.metadata)

    def joined(self, names: Mapping[str, str], other: "CheckpointReader") -> "CheckpointReader":
        """A reader that also has tensors of another one: {new name: name there}."""
        added = {name: other._entries[source] for name, source in names.items()}
        return CheckpointReader(self.path, {**self._entries, **added}, self.metadata)


def open_checkpoint(path: str | Path) -> CheckpointReader:
    """Opens a PyTorch, numpy-pickle or safetensors checkpoint without running code from it.

    Args:
        path: a file, an index file of a sharded checkpoint, or a folder with one of transformers' file names.

    Raises:
        FileNotFoundError: the path, or a shard that an index names, does not exist.
        UnsafeCheckpointError: a pickle that needs more than tensors and plain containers.
        ValueError: an unknown, truncated or corrupt file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.is_dir():
        for name in _FOLDER_FILES:
            if (path / name).is_file():
                return open_checkpoint(path / name)
        raise FileNotFoundError(f"{path} holds none of {', '.join(_FOLDER_FILES)}")
    with path.open("rb") as file:
        head = file.read(16)
    if not head:
        raise ValueError(f"{path} is empty")
    if head[:2] == b"PK":
        return _open_zip(path)
    if head[:1] == b"\x80":
        return _open_pickle(path)
    if head.lstrip()[:1] == b"{" and head[8:9] != b"{":
        return _open_index(path)
    if head[8:9] == b"{":
        return _open_safetensors(path)
    raise ValueError(f"{path} is no checkpoint this reader knows (PyTorch, numpy pickle, safetensors)")


def reader_of(arrays: Mapping[str, np.ndarray], path: str | Path = "arrays in memory") -> CheckpointReader:
    """Arrays in memory as a reader; `path` is for messages."""
    return CheckpointReader(
        Path(path),
        {name: _Entry(array.shape, array.dtype, lambda array=array: array) for name, array in arrays.items()},
    )


def load_torch_state(path: str | Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint in memory; see `open_checkpoint`."""
    return dict(open_checkpoint(path))


def _open_safetensors(path: Path) -> CheckpointReader:
    def read(name):
        with safe_open(path, framework="numpy") as file:
            return file.get_tensor(name)

    def layer(name, index):
        with safe_open(path, framework="numpy") as file:
            return file.get_slice(name)[index : index + 1][0]

    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            entries = {
                name: _Entry(
                    tuple(part.get_shape()),
                    _safetensors_dtype(part.get_dtype()),
                    functools.partial(read, name),
                    functools.partial(layer, name),
                )
                for name, part in slices.items()
            }
            metadata = file.metadata()
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    return CheckpointReader(path, entries, metadata)


def _safetensors_dtype(name: str) -> np.dtype:
    special = {"BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
    if name in special:
        return np.dtype(special[name])
    if name == "BOOL":
        return np.dtype(bool)
    kind = {"F": "f", "I": "i", "U": "u"}[name[0]]
    return np.dtype(f"{kind}{int(name[1:]) // 8}")


def _open_index(path: Path) -> CheckpointReader:
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not the index of a sharded checkpoint (no weight_map)") from error
    readers = {}
    for shard in shards:
        file = path.parent / shard
        if not file.is_file():
            raise FileNotFoundError(f"{path} refers to the shard {shard}, which does not exist in {path.parent}")
        readers[shard] = open_checkpoint(file)
    entries = {}
    for name, shard in weight_map.items():
        if name not in readers[shard]:
            raise ValueError(f"{path} places {name} in {shard}, which does not hold it")
        entries[name] = readers[shard]._entries[name]
    return CheckpointReader(path, entries)


def _open_zip(path: Path) -> CheckpointReader:
    try:
        archive = zipfile.ZipFile(path)
        pickles = [name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1:
            raise ValueError(f"{path} is a zip archive but not a PyTorch checkpoint (no data.pkl)")
        prefix = pickles[0].removesuffix("data.pkl")
        order = "little"
        if f"{prefix}byteorder" in archive.namelist():
            order = archive.read(f"{prefix}byteorder").decode()
        root = _unpickle(io.BytesIO(archive.read(pickles[0])), path)
        archive.close()
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is truncated or corrupt: {error}") from error

    def load(storage: Storage) -> np.ndarray:
        try:
            with zipfile.ZipFile(path) as archive:
                data = archive.read(f"{prefix}data/{storage.key}")
        except (KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: storage {storage.key} is missing or corrupt: {error}") from error
        return _buffer(data, storage, path, order)

    return _from_objects(path, root, load)


def _open_pickle(path: Path) -> CheckpointReader:
    with path.open("rb") as file:
        first = _unpickle(file, path)
        if first != _LEGACY_MAGIC:
            return _from_objects(path, first, _no_storages(path))
        _unpickle(file, path)  # protocol version
        system = _unpickle(file, path)
        order = "little" if not isinstance(system, dict) or system.get("little_endian", True) else "big"
        unpickler = RestrictedUnpickler(file, str(path))
        root = _guarded(unpickler.load, path)
        offsets = {}
        for key in _unpickle(file, path):
            if key not in unpickler.storages:
                raise ValueError(f"{path}: storage {key} belongs to no tensor")
            storage = unpickler.storages[key]
            file.read(8)  # number of elements, known already
            offsets[key] = file.tell()
            file.seek(storage.size * storage.dtype.itemsize, io.SEEK_CUR)
        end = file.tell()
        if end > file.seek(0, io.SEEK_END):
            raise ValueError(f"{path} is truncated: {end} bytes expected")

    def load(storage: Storage) -> np.ndarray:
        if storage.key not in offsets:
            raise ValueError(f"{path}: storage {storage.key} is missing")
        with path.open("rb") as file:
            file.seek(offsets[storage.key])
            return _buffer(file.read(storage.size * storage.dtype.itemsize), storage, path, order)

    return _from_objects(path, root, load)


def _no_storages(path: Path) -> Callable[[Storage], np.ndarray]:
    def load(storage: Storage) -> np.ndarray:
        raise ValueError(f"{path}: storage {storage.key} is missing")

    return load


def _unpickle(file, path: Path) -> Any:
    return _guarded(RestrictedUnpickler(file, str(path)).load, path)


def _guarded(load: Callable[[], Any], path: Path) -> Any:
    try:
        return load()
    except UnsafeCheckpointError:
        raise
    except _PICKLE_ERRORS as error:
        raise ValueError(f"{path} is truncated or corrupt: {error}") from error


def _buffer(data: bytes, storage: Storage, path: Path, order: str) -> np.ndarray:
    if len(data) != storage.size * storage.dtype.itemsize:
        raise ValueError(f"{path} is truncated or corrupt: storage {storage.key} has {len(data)} bytes")
    array = np.frombuffer(data, storage.dtype)
    return array if order == "little" else array.byteswap()


def _from_objects(path: Path, root: Any, load: Callable[[Storage], np.ndarray]) -> CheckpointReader:
    """Finds the parameters in what was unpickled, below the usual wrappers."""
    metadata = {}
    while isinstance(root, dict):
        metadata.update({key: value for key, value in root.items() if isinstance(value, str)})
        inner = next((root[key] for key in _WRAPPERS if isinstance(root.get(key), dict)), None)
        if inner is None:
            break
        root = inner
    if not isinstance(root, dict):
        raise ValueError(f"{path} holds a {type(root).__name__}, not named tensors")
    entries = {}
    for name, value in root.items():
        value = unwrap(value)
        if isinstance(value, np.generic):
            value = np.asarray(value)
        if isinstance(value, TensorRef):
            entries[name] = _Entry(value.shape, value.dtype, lambda ref=value: ref.read(load))
        elif isinstance(value, np.ndarray):
            entries[name] = _Entry(value.shape, value.dtype, lambda array=value: array)
    if not entries:
        raise ValueError(f"{path} holds no tensors")
    return CheckpointReader(path, entries, metadata)
