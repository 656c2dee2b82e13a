"""Checkpoint files: what is read, what is refused, and how."""

import io
import json
import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from esg_jax.interop.readers import load_torch_state, open_checkpoint
from esg_jax.interop.restricted_pickle import UnsafeCheckpointError
from esg_jax.interop.writers import write_pth, write_safetensors


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.normal(size=(3, 4)).astype(np.float32),
        "a.bias": rng.normal(size=300).astype(np.float64),
        "half": rng.normal(size=(2, 2)).astype(np.float16),
        "brain": rng.normal(size=(2, 2)).astype(ml_dtypes.bfloat16),
        "counter": np.array(7, np.int64),
        "index": rng.integers(0, 9, (2, 70000)),
        "flags": np.array([True, False]),
        "nothing": np.zeros((0, 3), np.float32),
    }


def assert_same(actual, expected):
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and actual[name].shape == value.shape
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


def layout(arrays):
    return {name: (x.shape, x.dtype) for name, x in arrays.items()}


def test_pth(arrays, tmp_path):
    write_pth(tmp_path / "x.pth", arrays.items(), {"note": "hello"})
    reader = open_checkpoint(tmp_path / "x.pth")
    assert reader.metadata == {"note": "hello"}
    assert {name: (reader.shape(name), reader.dtype(name)) for name in reader} == layout(arrays)
    assert_same(dict(reader), arrays)


def test_safetensors(arrays, tmp_path):
    write_safetensors(tmp_path / "x.anything", layout(arrays), reversed(arrays.items()), {"note": "hello"})
    reader = open_checkpoint(tmp_path / "x.anything")
    assert reader.metadata == {"note": "hello"}
    assert {name: (reader.shape(name), reader.dtype(name)) for name in reader} == layout(arrays)
    assert_same(dict(reader), arrays)


@pytest.mark.torch
def test_pytorch_reads_what_we_write(arrays, tmp_path):
    torch = pytest.importorskip("torch")
    write_pth(tmp_path / "x.pth", arrays.items(), {"note": "hello"})
    loaded = torch.load(tmp_path / "x.pth", weights_only=True)
    assert loaded["note"] == "hello"
    state = loaded["model"]
    assert state["brain"].dtype == torch.bfloat16
    state["brain"] = state["brain"].float()
    arrays["brain"] = arrays["brain"].astype(np.float32)
    assert_same({name: tensor.numpy() for name, tensor in state.items()}, arrays)


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_we_read_what_pytorch_writes(zipped, tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(24, dtype=torch.float32)
    state = {
        "view": base[4:16].reshape(3, 4).T,  # shares a storage, offset and transposed
        "whole": base,
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "brain": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "scalar": torch.tensor(3),
    }
    checkpoint = {"model": state, "optimizer": {"state": {}, "lr": 0.1}, "iteration": 5}
    torch.save(checkpoint, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    loaded = load_torch_state(tmp_path / "x.pth")
    np.testing.assert_array_equal(loaded["view"], state["view"].numpy())
    np.testing.assert_array_equal(loaded["whole"], base.numpy())
    np.testing.assert_array_equal(loaded["parameter"], [1, 1])
    np.testing.assert_array_equal(loaded["brain"].astype(np.float32), [1.5, -2])
    assert loaded["scalar"] == 3 and loaded["scalar"].dtype == np.int64 and len(loaded) == 5


@pytest.mark.parametrize("protocol", [2, 4])
def test_numpy_pickles(protocol, tmp_path):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.asfortranarray(np.arange(6.0).reshape(2, 3))}
    content = {"model": {**arrays, "c": np.float32(3)}, "__author__": "someone", "matching_heuristics": True}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(content, protocol))
    assert_same(load_torch_state(tmp_path / "R-50.pkl"), {**arrays, "c": np.array(3, np.float32)})


class Malicious:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("wrap", ["pickle", "zip", "nested"])
def test_code_is_refused_and_not_run(wrap, tmp_path):
    victim, file = tmp_path / "victim", tmp_path / "x.pth"
    data = pickle.dumps({"model": {"w": Malicious(victim)}} if wrap == "nested" else Malicious(victim), 2)
    if wrap == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", data)
    else:
        file.write_bytes(data)
    with pytest.raises(UnsafeCheckpointError, match=r"refers to \w+\.mkdir"):
        open_checkpoint(file)
    assert not victim.exists()


@pytest.mark.parametrize(
    "name", ["builtins.eval", "builtins.getattr", "numpy.core.multiarray.fromfile", "torch.load", "torch._utils.os"]
)
def test_names_outside_the_list_are_refused(name, tmp_path):
    module, _, attribute = name.rpartition(".")
    (tmp_path / "x").write_bytes(
        pickle.PROTO + b"\x02" + pickle.GLOBAL + f"{module}\n{attribute}\n".encode() + pickle.STOP
    )
    with pytest.raises(UnsafeCheckpointError, match=name.replace(".", r"\.")):
        open_checkpoint(tmp_path / "x")


def test_object_arrays_are_refused(tmp_path):
    (tmp_path / "x").write_bytes(pickle.dumps({"a": np.array([object], dtype=object)}, 2))
    with pytest.raises(UnsafeCheckpointError):
        open_checkpoint(tmp_path / "x")


@pytest.mark.parametrize("writer", ["pth", "safetensors", "pickle", "legacy"])
def test_truncated_files(writer, arrays, tmp_path):
    file = tmp_path / "x"
    if writer == "pth":
        write_pth(file, arrays.items(), {})
    elif writer == "safetensors":
        write_safetensors(file, layout(arrays), arrays.items())
    elif writer == "pickle":
        file.write_bytes(pickle.dumps({"a": arrays["a.bias"]}, 4))
    else:
        torch = pytest.importorskip("torch")
        torch.save({"a": torch.zeros(1000)}, file, _use_new_zipfile_serialization=False)
    data = file.read_bytes()
    for keep in (len(data) // 4, len(data) // 2, len(data) - 9):
        file.write_bytes(data[:keep])
        with pytest.raises(ValueError, match=str(file)):
            load_torch_state(file)


def test_tensor_that_reaches_outside_its_storage(tmp_path):
    file = tmp_path / "x"
    write_pth(file, {"a": np.zeros((2, 3), np.float32)}.items(), {})
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    shape = pickle.LONG1 + b"\x01\x02" + pickle.LONG1 + b"\x01\x03"
    assert shape in parts["archive/data.pkl"]
    parts["archive/data.pkl"] = parts["archive/data.pkl"].replace(shape, shape.replace(b"\x01\x02", b"\x01\x7f"))
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    with pytest.raises(ValueError, match="outside its storage"):
        load_torch_state(file)


@pytest.fixture
def sharded(arrays, tmp_path):
    names = list(arrays)
    shards = {"one.safetensors": names[:3], "two.safetensors": names[3:]}
    for shard, members in shards.items():
        part = {name: arrays[name] for name in members}
        write_safetensors(tmp_path / shard, layout(part), part.items())
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def test_sharded(arrays, sharded):
    assert_same(load_torch_state(sharded), arrays)
    assert_same(load_torch_state(sharded.parent), arrays)


def test_absent_shard(sharded):
    (sharded.parent / "two.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"refers to the shard two\.safetensors, which does not exist"):
        open_checkpoint(sharded)


def test_shard_without_its_tensor(sharded):
    content = json.loads(sharded.read_text())
    content["weight_map"]["ghost"] = "one.safetensors"
    sharded.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"places ghost in one\.safetensors"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("text", ["{", '{"weights": 1}', '{"weight_map": 3}'])
def test_broken_index(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="x.json"):
        open_checkpoint(tmp_path / "x.json")


def test_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        open_checkpoint(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="holds none of model.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(ValueError, match="empty is empty"):
        open_checkpoint(tmp_path / "empty")
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0 JFIF this is a photo")
    with pytest.raises(ValueError, match="no checkpoint this reader knows"):
        open_checkpoint(tmp_path / "photo.jpg")
    (tmp_path / "list").write_bytes(pickle.dumps([1, 2], 2))
    with pytest.raises(ValueError, match="holds a list, not named tensors"):
        open_checkpoint(tmp_path / "list")
    (tmp_path / "numbers").write_bytes(pickle.dumps({"a": 1}, 2))
    with pytest.raises(ValueError, match="holds no tensors"):
        open_checkpoint(tmp_path / "numbers")
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match="no data.pkl"):
        open_checkpoint(tmp_path / "archive.zip")


def test_damaged_bytes_never_crash(arrays, tmp_path):
    """Any change of any byte of the pickle gives tensors or one of our errors."""
    buffer = io.BytesIO()
    file = tmp_path / "x"
    write_pth(file, {"a": arrays["a.weight"], "b": arrays["counter"]}.items(), {"n": "x"})
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    rng = np.random.default_rng(0)
    data = parts["archive/data.pkl"]
    for _ in range(300):
        damaged = bytearray(data)
        damaged[rng.integers(len(data))] = rng.integers(256)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, part in parts.items():
                archive.writestr(name, bytes(damaged) if name.endswith("data.pkl") else part)
        file.write_bytes(buffer.getvalue())
        try:
            load_torch_state(file)
        except ValueError:
            pass


def test_writer_checks_what_it_is_given(arrays, tmp_path):
    with pytest.raises(ValueError, match="was not announced"):
        write_safetensors(tmp_path / "x", {}, arrays.items())
    with pytest.raises(ValueError, match="no tensor came for a"):
        write_safetensors(tmp_path / "x", layout(arrays), [])
    with pytest.raises(ValueError, match=r"a has shape \(2,\), announced was \(3,\)"):
        write_safetensors(tmp_path / "x", {"a": ((3,), np.dtype(np.float32))}, [("a", np.zeros(2, np.float32))])
    assert not list(tmp_path.iterdir())
