"""Training of a whole, very small CropFormer on files: losses, devices, resume, the command line."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import tiny
from esg_jax.input.pipeline import train_iterator
from esg_jax.train.checkpoint import Checkpointer
from esg_jax.train.config import RunConfig
from esg_jax.train.logging import MetricWriter
from esg_jax.train.loop import LoopConfig, fit
from esg_jax.train.sharding import make_mesh, put_batch

pytestmark = pytest.mark.slow
REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tiny_data) -> RunConfig:
    config = RunConfig.from_dict(tiny.get_config(str(tiny_data)).to_dict())
    return dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=4))


@pytest.fixture(scope="module")
def step(run):
    """On one device; compiled once for all tests."""
    return run.train_step(mesh=make_mesh(1, 1, 1, devices=jax.devices()[:1]))


def train(step, run, num_steps=5):
    state, history, batches = step.init(), [], train_iterator(run.data)
    for _ in range(num_steps):
        state, metrics = step(state, put_batch(next(batches), step.mesh))
        history.append({name: float(value) for name, value in metrics.items()})
    batches.close()
    return state, history


@pytest.fixture(scope="module")
def one_device(step, run):
    return train(step, run)


def test_every_term_is_there_and_adds_up(one_device):
    _, history = one_device
    kinds = itertools.product(("ce", "mask", "dice"), ("_0", ""), ("2d", "3d"))
    expected = {f"loss_{term}{index}_{level}" for term, index, level in kinds}
    terms = {name for name in history[0] if name.startswith("loss_")}
    assert terms == expected
    for metrics in history:
        np.testing.assert_allclose(metrics["loss"], sum(metrics[name] for name in terms), rtol=1e-5)
        assert metrics["bad_steps"] == 0


def test_eight_devices_equal_one(run, one_device):
    """Weights split over 4 x 2 devices, drop path on: the losses of five steps differ by rounding only."""
    step_8 = run.train_step(mesh=make_mesh(1, 4, 2))
    state_8, history_8 = train(step_8, run)
    specs = {tuple(value.sharding.spec) for value in state_8.params.values()}
    assert {("fsdp", "model"), ("model", "fsdp")} <= specs
    for name in one_device[1][0]:
        if name.startswith("loss"):
            ours = [metrics[name] for metrics in history_8]
            expected = [metrics[name] for metrics in one_device[1]]
            np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kill_before", [2, 7])
def test_resume_is_exact(step, run, one_device, tmp_path, kill_before):
    """With the real input pipeline: a run that died before some step repeats no batch and loses none."""

    class Killed(Exception):
        pass

    def until(batches, limit):
        for number in itertools.count(1):
            if number == limit:
                raise Killed
            yield next(batches)

    def attempt(limit):
        checkpointer = Checkpointer(tmp_path, config=run.as_dict())
        batches = train_iterator(run.data)
        fresh = checkpointer.latest_step is None
        state = step.init() if fresh else checkpointer.restore(step.abstract_state, batches)
        saver = _SaveIterator(checkpointer, batches)
        writer = MetricWriter(tmp_path)
        try:
            config = LoopConfig(total_steps=8, log_every=1, save_every=3)
            return fit(state, step, until(batches, limit), config, writer=writer, checkpointer=saver)
        finally:
            writer.close()
            checkpointer.close()
            batches.close()

    with pytest.raises(Killed):
        attempt(kill_before)
    state = attempt(None)
    whole, history = train(step, run, 8)
    logged = _losses(tmp_path)
    assert [logged[number] for number in range(1, 9)] == [metrics["loss"] for metrics in history]
    jax.tree.map(np.testing.assert_array_equal, state, whole)


@dataclasses.dataclass
class _SaveIterator:
    """Saves the Grain iterator, which a generator hides from the loop."""

    checkpointer: Checkpointer
    batches: object

    def save(self, state, _):
        self.checkpointer.save(state, self.batches)


def _losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


def test_command_line_survives_a_kill(tiny_data, tmp_path):
    """SIGKILL in the middle of train.py; the same command goes on and repeats the steps since the last save."""
    command = [sys.executable, "train.py", f"--config=configs/tiny.py:{tiny_data}", f"--workdir={tmp_path}/run"]
    command.append("--config.loop.total_steps=60")
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{tmp_path}/cache", "XLA_FLAGS": ""}
    log = tmp_path / "run" / "metrics.jsonl"
    saved = tmp_path / "run" / "checkpoints"
    with subprocess.Popen(command, cwd=REPO, env=env, stdout=subprocess.DEVNULL) as process:
        # Saving is asynchronous: a folder named after its step alone is complete.
        while process.poll() is None:
            steps = [int(path.name) for path in saved.glob("*") if path.name.isdigit()]
            if steps and len(log.read_text().splitlines()) > max(steps):
                break  # at least one step after the checkpoint is known and will be repeated
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, check=True)
    assert "resumed at step" in done.stdout and "step 60 of 60; weights in" in done.stdout
    twice = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
    by_step: dict[int, set] = {}
    for line in twice:
        by_step.setdefault(line["step"], set()).add((line["loss"], line["grad_norm"]))
    assert sorted(by_step) == list(range(1, 61)) and len(twice) > 60
    assert all(len(values) == 1 for values in by_step.values())
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_command_line_refuses_nonsense(tiny_data, tmp_path):
    command = [sys.executable, "train.py", f"--config=configs/tiny.py:{tiny_data}", f"--workdir={tmp_path}"]
    result = subprocess.run([*command, "--config.optim.lr=1"], cwd=REPO, capture_output=True, text=True)
    assert result.returncode and "lr" in result.stderr
    result = subprocess.run([*command, "--config.precision=float8"], cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.strip().endswith("error: config.precision is 'float8'; choose bfloat16 or float32")
