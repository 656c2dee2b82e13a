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
from esg_jax.sharding import make_mesh, put_batch
from esg_jax.train.checkpoint import Checkpointer
from esg_jax.train.config import RunConfig
from esg_jax.train.logging import MetricWriter
from esg_jax.train.loop import LoopConfig, fit
from esg_jax.weights import load_model, named_arrays, read_info

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


@dataclasses.dataclass
class CommandLine:
    """train.py in processes that share compiled programs."""

    data: Path
    cache: Path

    def arguments(self, workdir, *more):
        command = [sys.executable, "train.py", f"--config=configs/tiny.py:{self.data}", f"--workdir={workdir}"]
        command += ["--config.loop.total_steps=60", "--config.ema_decay=0.99", *more]
        env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(self.cache), "XLA_FLAGS": ""}
        return {"args": command, "cwd": REPO, "env": env}

    def finish(self, workdir, *more) -> str:
        return subprocess.run(**self.arguments(workdir, *more), capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def command_line(tiny_data, tmp_path_factory):
    return CommandLine(tiny_data, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def killed_run(command_line, tmp_path_factory):
    """Workdir and last output of a run that got SIGKILL in the middle and was started again."""
    workdir = tmp_path_factory.mktemp("killed") / "run"
    log = workdir / "metrics.jsonl"
    saved = workdir / "checkpoints"
    with subprocess.Popen(**command_line.arguments(workdir), stdout=subprocess.DEVNULL) as process:
        # Saving is asynchronous: a folder named after its step alone is complete.
        while process.poll() is None:
            steps = [int(path.name) for path in saved.glob("*") if path.name.isdigit()]
            if steps and len(log.read_text().splitlines()) > max(steps):
                break  # at least one step after the checkpoint is known and will be repeated
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    return workdir, command_line.finish(workdir)


def _entries(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]


def test_command_line_survives_a_kill(killed_run):
    """The same command goes on and repeats the steps since the last save."""
    workdir, output = killed_run
    assert "resumed at step" in output and "step 60 of 60; weights in" in output
    twice = _entries(workdir)
    by_step: dict[int, set] = {}
    for line in twice:
        by_step.setdefault(line["step"], set()).add((line["loss"], line["grad_norm"]))
    assert sorted(by_step) == list(range(1, 61)) and len(twice) > 60
    assert all(len(values) == 1 for values in by_step.values())
    assert read_info(workdir / "model.safetensors")[1]["config"]["ema_decay"] == 0.99


def test_evaluation_changes_nothing(killed_run, command_line, tiny_data, tmp_path):
    """The losses of a run that is evaluated on the way equal, bit for bit, those of one that is not."""
    recipe = [f"--eval=configs/recipes/scenes.py:{tiny_data}", "--eval.views=1", "--eval.max_images=2"]
    recipe += ["--eval.min_size=64", "--eval.max_size=64"]
    output = command_line.finish(tmp_path, *recipe, "--config.loop.eval_every=40")
    entries = _entries(tmp_path)
    assert [line["step"] for line in entries if "eval/AP" in line] == [40, 60]
    assert {"eval/AR100", "eval/AR@100@IoU0.5", "eval/mean_best_iou"} <= set(entries[-1])
    assert "evaluation at step 60: AP " in output and (tmp_path / "eval" / "grid.png").exists()
    losses = {line["step"]: line["loss"] for line in entries if "loss" in line}
    assert losses == {line["step"]: line["loss"] for line in _entries(killed_run[0])}
    ours, theirs = (named_arrays(load_model(folder / "model.safetensors")) for folder in (tmp_path, killed_run[0]))
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def test_command_line_refuses_nonsense(tiny_data, tmp_path):
    command = [sys.executable, "train.py", f"--config=configs/tiny.py:{tiny_data}", f"--workdir={tmp_path}"]
    result = subprocess.run([*command, "--config.optim.lr=1"], cwd=REPO, capture_output=True, text=True)
    assert result.returncode and "lr" in result.stderr
    for override, message in (
        ("--config.precision=float8", "config.precision is 'float8'; choose bfloat16 or float32"),
        ("--config.ema_decay=soon", "config.ema_decay is 'soon'; expected float or None"),
        ("--config.loop.eval_every=5", "to evaluate while training give both --eval=RECIPE.py"),
    ):
        result = subprocess.run([*command, override], cwd=REPO, capture_output=True, text=True)
        assert result.returncode == 1
        assert f"error: {message}" in result.stderr.strip().splitlines()[-1]
