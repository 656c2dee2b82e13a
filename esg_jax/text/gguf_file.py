"""llama.cpp's GGUF container: metadata and tensors, plain or in the older block quantisations.

Layout (version 2 and 3, little endian): magic, version, counts; key/value metadata; names, shapes, types and offsets of
the tensors; aligned tensor data. In the quantised types 32 consecutive values of a row share a scale.
"""

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_BLOCK = 32
_PLAIN = {0: np.dtype("<f4"), 1: np.dtype("<f2"), 30: np.dtype(ml_dtypes.bfloat16)}
# Type number -> name and the record of one block; nibbles hold values 0..15 in the low and 16..31 in the high halves.
_QUANTISED = {
    2: ("Q4_0", np.dtype([("scale", "<f2"), ("nibbles", "u1", _BLOCK // 2)])),
    3: ("Q4_1", np.dtype([("scale", "<f2"), ("least", "<f2"), ("nibbles", "u1", _BLOCK // 2)])),
    8: ("Q8_0", np.dtype([("scale", "<f2"), ("values", "i1", _BLOCK)])),
}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        shape: row-major, as numpy has it (the file lists dimensions in reverse).
        type: llama.cpp's number of the storage type.
        offset: of its first byte in the file.
    """

    shape: tuple[int, ...]
    type: int
    offset: int


class GgufFile:
    """An open GGUF file.

    Attributes:
        path: the file.
        metadata: all key/value pairs; strings decoded, arrays as lists.
        tensors: name -> where it lies.
    """

    def __init__(self, path: str | Path):
        """Reads everything but the tensors.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a GGUF file of version 2 or 3, or a truncated one.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no GGUF file at {path}")
        self._bytes = np.memmap(self.path, np.uint8, "r") if self.path.stat().st_size else np.empty(0, np.uint8)
        if bytes(self._bytes[:4]) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file")
        self._at = 4
        try:
            version, num_tensors, num_pairs = self._scalars("IQQ")
            if version not in (2, 3):
                raise ValueError(f"{path} has GGUF version {version}; 2 and 3 are supported")
            self.metadata: dict[str, Any] = {}
            for _ in range(num_pairs):
                key = self._string()
                self.metadata[key] = self._value(self._scalars("I")[0])
            found = [self._tensor_info() for _ in range(num_tensors)]
        except (struct.error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is truncated or damaged: {error}") from error
        alignment = self.metadata.get("general.alignment", 32)
        start = -(-self._at // alignment) * alignment
        self.tensors = {name: dataclasses.replace(info, offset=start + info.offset) for name, info in found}

    def _scalars(self, kinds: str) -> tuple:
        size = struct.calcsize("<" + kinds)
        values = struct.unpack("<" + kinds, self._bytes[self._at : self._at + size].tobytes())
        self._at += size
        return values

    def _string(self) -> str:
        (length,) = self._scalars("Q")
        text = self._bytes[self._at : self._at + length].tobytes()
        if len(text) < length:
            raise struct.error(f"a string of {length} bytes at byte {self._at} passes the end")
        self._at += length
        return text.decode()

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner, length = self._scalars("IQ")
            if inner in _SCALARS:
                if length > len(self._bytes):
                    raise struct.error(f"an array of {length} values passes the end")
                return list(self._scalars(f"{length}{_SCALARS[inner]}"))
            return [self._value(inner) for _ in range(length)]
        if kind not in _SCALARS:
            raise ValueError(f"{self.path} has metadata of unknown type {kind} at byte {self._at}")
        return self._scalars(_SCALARS[kind])[0]

    def _tensor_info(self) -> tuple[str, TensorInfo]:
        name = self._string()
        (num_dims,) = self._scalars("I")
        shape = self._scalars(f"{num_dims}Q")
        kind, offset = self._scalars("IQ")
        return name, TensorInfo(tuple(reversed(shape)), kind, offset)

    def read(self, name: str) -> np.ndarray:
        """A tensor as float32.

        Raises:
            KeyError: there is none of that name.
            ValueError: a storage type that is not supported, or the file ends before the tensor does.
        """
        info = self.tensors[name]
        size = math.prod(info.shape)
        if info.type in _PLAIN:
            return self._records(name, _PLAIN[info.type], size).astype(np.float32).reshape(info.shape)
        if info.type not in _QUANTISED:
            known = ", ".join(["F32", "F16", "BF16", *(kind for kind, _ in _QUANTISED.values())])
            raise ValueError(f"{self.path}: {name} is stored as type {info.type}; supported are {known}")
        kind, record = _QUANTISED[info.type]
        blocks = self._records(name, record, size // _BLOCK)
        if kind == "Q8_0":
            values = blocks["values"].astype(np.float32)
        else:
            nibbles = blocks["nibbles"]
            values = np.concatenate([nibbles & 15, nibbles >> 4], axis=1).astype(np.float32)
            values -= 8 if kind == "Q4_0" else 0
        values *= blocks["scale"].astype(np.float32)[:, None]
        if kind == "Q4_1":
            values += blocks["least"].astype(np.float32)[:, None]
        return values.reshape(info.shape)

    def _records(self, name: str, record: np.dtype, count: int) -> np.ndarray:
        offset = self.tensors[name].offset
        part = self._bytes[offset : offset + count * record.itemsize]
        if len(part) < count * record.itemsize:
            raise ValueError(f"{self.path} is truncated: it ends before tensor {name}")
        return np.asarray(part).view(record)
