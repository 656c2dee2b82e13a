"""Checkpoint files written tensor by tensor: safetensors, and PyTorch's zip format without PyTorch."""

import itertools
import json
import math
import pickle
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_SAFETENSORS = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_STORAGES = {
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
    np.dtype(np.int32): "IntStorage",
    np.dtype(np.int16): "ShortStorage",
    np.dtype(np.int8): "CharStorage",
    np.dtype(np.uint8): "ByteStorage",
    np.dtype(np.bool_): "BoolStorage",
}


def write_safetensors(
    path: str | Path,
    layout: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    tensors: Iterable[tuple[str, Any]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors as they come; nothing but the current one is in memory.

    Args:
        path: target; appears only when complete.
        layout: shape and type of every tensor.
        tensors: exactly the tensors of `layout`, in any order; converted to the type given there. Arrays, or anything
            with a shape that yields one array per index of the first axis.
        metadata: text to store with them.

    Raises:
        ValueError: the tensors are not those of `layout`.
    """
    path = Path(path)
    # Widest types first keeps every tensor aligned, as the format's own writer does.
    order = sorted(layout, key=lambda name: (-np.dtype(layout[name][1]).itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        shape, dtype = layout[name]
        start, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        code = _SAFETENSORS[np.dtype(dtype).name]
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    temporary = path.with_name(path.name + ".partial")
    left = set(layout)
    try:
        with temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
            for name, array in tensors:
                if name not in left:
                    raise ValueError(f"{name} was not announced, or comes twice")
                shape, dtype = layout[name]
                if array.shape != tuple(shape):
                    raise ValueError(f"{name} has shape {array.shape}, announced was {tuple(shape)}")
                left.remove(name)
                file.seek(8 + len(text) + header[name]["data_offsets"][0])
                for piece in (array,) if isinstance(array, np.ndarray) else array:
                    flat = np.ascontiguousarray(piece.astype(dtype, copy=False)).reshape(-1)
                    file.write(memoryview(flat.view(np.uint8)))
        if left:
            raise ValueError(f"no tensor came for {', '.join(sorted(left)[:5])}")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_sharded(
    folder: str | Path,
    layout: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    tensors: Iterable[tuple[str, np.ndarray]],
    max_bytes: int = 5 * 10**9,
) -> list[Path]:
    """Writes `model.safetensors`, or shards of at most `max_bytes` (or one tensor) with transformers' index file.

    Args:
        folder: target, created when absent. After an error none of the files is there.
        layout: shape and type of every tensor, in the order of `tensors`.
        tensors: as for `write_safetensors`.
        max_bytes: size of a shard.

    Returns:
        The files written.

    Raises:
        ValueError: the tensors are not those of `layout`.
    """
    folder = Path(folder)
    shards: list[dict] = [{}]
    sizes = [0]
    for name, (shape, dtype) in layout.items():
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if shards[-1] and sizes[-1] + size > max_bytes:
            shards.append({})
            sizes.append(0)
        shards[-1][name] = (shape, dtype)
        sizes[-1] += size
    names = [f"model-{index:05}-of-{len(shards):05}.safetensors" for index in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    tensors = iter(tensors)
    try:
        for name, shard in zip(names, shards, strict=True):
            # "pt" is what transformers insists on finding in the metadata.
            write_safetensors(folder / name, shard, itertools.islice(tensors, len(shard)), {"format": "pt"})
            written.append(folder / name)
        if len(shards) > 1:
            index = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            path = folder / "model.safetensors.index.json"
            path.write_text(json.dumps({"metadata": {"total_size": sum(sizes)}, "weight_map": index}, indent=2) + "\n")
            written.append(path)
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return written


def write_pth(path: str | Path, tensors: Iterable[tuple[str, np.ndarray]], metadata: Mapping[str, str]) -> None:
    """Writes ``{"model": state_dict, **metadata}`` as `torch.save` would; `torch.load(weights_only=True)` reads it.

    Args:
        path: target; appears only when complete.
        tensors: names and arrays.
        metadata: text stored beside the state dict.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".partial")
    body = bytearray()
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            for index, (name, array) in enumerate(tensors):
                array = np.asarray(array)
                flat = np.ascontiguousarray(array).reshape(-1)
                archive.writestr(f"archive/data/{index}", flat.view(np.uint8).tobytes())
                body += _text(name) + _tensor(str(index), array)
            header = b"".join(_text(key) + _text(value) for key, value in metadata.items())
            state = pickle.EMPTY_DICT + pickle.MARK + bytes(body) + pickle.SETITEMS
            root = pickle.EMPTY_DICT + pickle.MARK + _text("model") + state + header + pickle.SETITEMS
            archive.writestr("archive/data.pkl", pickle.PROTO + b"\x02" + root + pickle.STOP)
            archive.writestr("archive/byteorder", "little")
            archive.writestr("archive/version", "3\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# Pickle opcodes for a tensor, spelled out, because the classes they name are PyTorch's.
def _text(value: str) -> bytes:
    data = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def _integer(value: int) -> bytes:
    data = pickle.encode_long(value)
    return pickle.LONG1 + bytes([len(data)]) + data


def _tuple(items: Iterable[bytes]) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _tensor(key: str, array: np.ndarray) -> bytes:
    storage = _tuple(
        [_text("storage"), _global("torch", _STORAGES[array.dtype]), _text(key), _text("cpu"), _integer(array.size)]
    )
    strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
    arguments = [
        storage + pickle.BINPERSID,
        _integer(0),
        _tuple(map(_integer, array.shape)),
        _tuple(map(_integer, strides)),
        pickle.NEWFALSE,
        _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE,
    ]
    return _global("torch._utils", "_rebuild_tensor_v2") + _tuple(arguments) + pickle.REDUCE
