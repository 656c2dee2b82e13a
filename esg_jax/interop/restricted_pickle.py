"""Unpickler for checkpoints that can build tensors, plain containers and nothing else.

A pickle names the functions that rebuild its objects, so loading one with the standard unpickler runs whatever its
author chose. Here every name resolves to a small class of our own or the file is refused; no name is ever imported.
"""

import dataclasses
import pickle
from collections.abc import Callable
from typing import IO, Any

import ml_dtypes
import numpy as np

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class UnsafeCheckpointError(ValueError):
    """The file asks for something other than tensors and plain containers."""


@dataclasses.dataclass(frozen=True)
class Storage:
    """A flat buffer of a checkpoint: its key in the file, type and number of elements."""

    key: str
    dtype: np.dtype
    size: int


@dataclasses.dataclass(frozen=True)
class TensorRef:
    """A strided view of a storage, in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return self.storage.dtype

    def read(self, load: Callable[[Storage], np.ndarray]) -> np.ndarray:
        """The tensor as an array; `load` returns the flat storage.

        Raises:
            ValueError: the view reaches outside its storage.
        """
        if len(self.shape) != len(self.strides) or min((self.offset, *self.shape, *self.strides), default=0) < 0:
            raise ValueError(f"tensor with offset {self.offset}, shape {self.shape} and strides {self.strides}")
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        if 0 not in self.shape and last >= self.storage.size:
            raise ValueError(f"tensor of shape {self.shape} reaches outside its storage of {self.storage.size} numbers")
        flat = load(self.storage)
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        strides = tuple(stride * flat.itemsize for stride in self.strides)
        view = np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, strides, writeable=False)
        return np.ascontiguousarray(view).reshape(self.shape)


class _Dict(dict):
    """Stands for `OrderedDict`; accepts the attributes that torch hangs on state dicts."""


class _Dtype:
    """Stands for `numpy.dtype(text, align, copy)`; its state carries the byte order."""

    def __init__(self, text: str, *_):
        self.value = np.dtype(text)

    def __setstate__(self, state):
        if state[1] in "<>":
            self.value = self.value.newbyteorder(state[1])


class _NumpyArray:
    """Stands for an array under reconstruction; its state carries shape, type and bytes."""

    value: np.ndarray | None = None

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        self.value = _from_bytes(dtype.value, data).reshape(shape, order="F" if fortran else "C")


def _from_bytes(dtype: np.dtype, data: Any) -> np.ndarray:
    if dtype.hasobject or not isinstance(data, bytes):
        raise UnsafeCheckpointError("the file holds an array of Python objects")
    return np.frombuffer(data, dtype)


def _rebuild_tensor(storage, offset, shape, strides, *_):
    if not isinstance(storage, Storage):
        raise ValueError(f"a tensor is built from {type(storage).__name__}, not from a storage")
    return TensorRef(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


def _encode_latin1(text: str, encoding: str) -> bytes:
    """Protocol 2 stores bytes as text."""
    if encoding not in ("latin1", "latin-1"):
        raise UnsafeCheckpointError(f"the file encodes text as {encoding!r}")
    return text.encode("latin1")


def _numpy_scalar(dtype, data):
    return _from_bytes(dtype.value, data)[0]


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("_codecs", "encode"): _encode_latin1,
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): None,  # only ever an argument of _reconstruct
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    _ALLOWED[_module, "_reconstruct"] = _NumpyArray
    _ALLOWED[_module, "scalar"] = _numpy_scalar
for _name, _type in _STORAGES.items():
    _ALLOWED["torch", _name] = np.dtype(_type)


class RestrictedUnpickler(pickle.Unpickler):
    """Resolves names from a closed list and torch's persistent ids to `Storage`; `storages` collects these by key."""

    def __init__(self, file: IO[bytes], path: str):
        super().__init__(file, encoding="latin1")
        self._path = path
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise UnsafeCheckpointError(
                f"{self._path} refers to {module}.{name}, and reading it would run code from the file; "
                "only checkpoints made of tensors and plain containers are read"
            ) from None

    def persistent_load(self, pid: Any) -> Storage:
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], np.dtype)):
            raise ValueError(f"{self._path}: unknown persistent id {str(pid)[:80]}")
        _, dtype, key, _, size = pid[:5]
        storage = self.storages[str(key)] = Storage(str(key), dtype, int(size))
        return storage


def unwrap(value: Any) -> Any:
    """An array instead of the stand-ins that unpickling numpy objects leaves behind."""
    return value.value if isinstance(value, (_NumpyArray, _Dtype)) else value
