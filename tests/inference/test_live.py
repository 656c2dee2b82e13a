"""Evaluation of weights that are being trained, split over devices and hosts: the numbers of one device afterwards."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from esg_jax.inference.bundle import open_bundle
from esg_jax.inference.engine import Engine
from esg_jax.sharding import Layout, make_mesh
from esg_jax.train import main as train
from esg_jax.weights import named_arrays

pytest.importorskip("tokenizers")
REPO = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("live_runs", Path(__file__).with_name("live_runs.py"))
live_runs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(live_runs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("live")
    live_runs.prepare(folder)
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    """`runs(system)` -> folder, configuration, step and state of a run that was evaluated on eight devices."""
    done = {}

    def run(system):
        if system not in done:
            out = folder / system
            out.mkdir()
            done[system] = out, *live_runs.evaluate_live(system, folder, out)
        return done[system]

    return run


def logged(out):
    (line,) = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    return {name.removeprefix("eval/"): float(value) for name, value in line.items() if name.startswith("eval/")}


def assert_same_predictions(one, other):
    """The same masks; scores are sums whose last digit depends on how a processor's threads share them."""
    pairs = zip(records(one), records(other), strict=True)
    for left, right in pairs:
        assert left.pop("score", 0) == pytest.approx(right.pop("score", 0), abs=1e-6)
        assert left == right


def records(folder):
    """Predictions of all processes, by image."""
    out = [record for file in sorted(folder.glob("predictions*.json")) for record in json.loads(file.read_text())]
    assert out
    return sorted(out, key=lambda record: record["image_id"])


def assert_nowhere_whole(arrays):
    """Every array that eight devices can divide has an eighth on each of them."""
    split = 0
    for name, array in arrays.items():
        if any(side % 8 == 0 for side in array.shape):
            shard = array.sharding.shard_shape(array.shape)
            assert np.prod(shard) == array.size // 8, f"{name} {array.shape} is {array.sharding}"
            split += array.size
    assert split > 0.7 * sum(array.size for array in arrays.values())


@pytest.mark.slow
@pytest.mark.parametrize("system", live_runs.SYSTEMS)
def test_sharded_during_training_equals_one_device_afterwards(runs, folder, tmp_path, system, monkeypatch):
    out, config, step, state = runs(system)
    bundle = train.live_bundle(config, state)
    model = bundle.load()
    assert_nowhere_whole(named_arrays(model))
    engine = Engine(model)
    assert engine.mesh == step.mesh
    for name, array in named_arrays(model).items():  # not moved, not copied: the buffers of the state
        assert array is state.weights()[name]
    assert_nowhere_whole({name: v for name, v in state.weights().items()})

    weights = train.export(config, step, state, tmp_path)
    scores = live_runs.evaluate_file(system, folder, tmp_path / "one", weights)
    assert len(logged(out)) > 4
    for name, value in logged(out).items():
        np.testing.assert_equal(value, scores[name], err_msg=name)
    assert_same_predictions(tmp_path / "one", out / "eval")

    # The same file straight onto a mesh: no array is whole there either.
    loaded = open_bundle(weights, mesh=step.mesh, rules=live_runs.RULES).load()
    assert_nowhere_whole(named_arrays(loaded))
    for name, array in named_arrays(loaded).items():
        np.testing.assert_array_equal(array, state.weights()[name])


@pytest.mark.slow
@pytest.mark.parametrize("system", live_runs.SYSTEMS)
def test_tensor_parallel(runs, folder, tmp_path, system):
    """Sums of halves round differently, so scores agree to the last digits only."""
    out, *_ = runs(system)
    live_runs.evaluate_live(system, folder, tmp_path, model_axis=2)
    for name, value in logged(tmp_path).items():
        np.testing.assert_allclose(value, logged(out)[name], rtol=1e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("system", live_runs.SYSTEMS)
def test_two_hosts_equal_one(runs, folder, system):
    out, *_ = runs(system)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    (folder / f"hosts_{system}").mkdir()
    script = [sys.executable, str(Path(__file__).with_name("live_runs.py")), system, str(folder)]
    hosts = [
        subprocess.Popen([*script, str(k), str(port)], env=environment, stderr=subprocess.PIPE, text=True)
        for k in range(2)
    ]
    try:
        for host in hosts:
            _, error = host.communicate(timeout=900)
            assert host.returncode == 0, error[-3000:]
    finally:
        for host in hosts:
            host.kill()
    np.testing.assert_equal(logged(folder / f"hosts_{system}"), logged(out))
    assert_same_predictions(folder / f"hosts_{system}" / "eval", out / "eval")


def test_every_device_reads_its_part(tiny_checkpoint):
    layout = Layout(make_mesh(1, 4, 2), live_runs.RULES)
    arrays = named_arrays(open_bundle(tiny_checkpoint, mesh=layout.mesh, rules=layout.rules).load())
    whole = named_arrays(open_bundle(tiny_checkpoint).load())
    for name, array in arrays.items():
        assert array.sharding == layout(name, array.shape)
        np.testing.assert_array_equal(array, whole[name])
    assert sum(not array.sharding.is_fully_replicated for array in arrays.values()) > len(arrays) / 2
    assert all(len(array.devices()) == 1 for array in whole.values())
    assert jax.device_count() == 8
