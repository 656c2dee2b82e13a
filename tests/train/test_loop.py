"""The loop with checkpoints: exact resume, signals, non-finite steps, mismatching configurations."""

import json
import os
import signal

import jax
import numpy as np
import pytest
import toy

from esg_jax.train.checkpoint import Checkpointer, CheckpointMismatchError, differences, load_run_weights
from esg_jax.train.logging import MetricWriter, duration
from esg_jax.train.loop import Hook, LoopConfig, NonFiniteLossError, fit

CONFIG = {"model": {"width": 16, "depths": (1, 2)}, "optim": {"learning_rate": 0.01}}
LOOP = LoopConfig(total_steps=12, log_every=1, save_every=4, max_bad_steps=3)


class Crash(Exception):
    """Stands for a killed process: nothing after it runs."""


def train(workdir, step, *, crash_at=None, loop=LOOP, spoil=(), config=CONFIG, at_step=None, **options):
    """Starts or resumes a run; returns its last state."""
    checkpointer = Checkpointer(workdir, config=config, keep=2)
    batches = toy.toy_batches()
    if checkpointer.latest_step is None:
        state = step.init()
    else:
        state = checkpointer.restore(step.abstract_state, batches)
    writer = MetricWriter(workdir)
    start = int(state.step)
    source = _Spoiled(batches, start, spoil, crash_at, at_step)
    try:
        return fit(state, step, source, loop, writer=writer, checkpointer=_Unwrap(checkpointer, source), **options)
    finally:
        writer.close()
        checkpointer.close()


class _Spoiled:
    """Passes batches on; crashes before one, makes others non-finite, or calls `at_step[number]`."""

    def __init__(self, batches, number, spoil, crash_at, at_step):
        self.batches, self.number, self.spoil, self.crash_at = batches, number, spoil, crash_at
        self.at_step = at_step or {}

    def __next__(self):
        batch = next(self.batches)
        self.number += 1
        if self.number == self.crash_at:
            raise Crash
        if self.number in self.at_step:
            self.at_step[self.number]()
        if self.number in self.spoil:
            batch = batch | {"target": np.full_like(batch["target"], np.nan)}
        return batch


class _Unwrap:
    """Saves the Grain iterator behind `_Spoiled`."""

    def __init__(self, checkpointer, source):
        self._checkpointer, self._source = checkpointer, source

    def save(self, state, _):
        self._checkpointer.save(state, self._source.batches)


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def whole(toy_step, tmp_path_factory):
    """An uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, train(workdir, toy_step)


@pytest.mark.parametrize("crash_at", [1, 4, 7, 12])
def test_resume_after_a_crash_is_exact(toy_step, whole, tmp_path, crash_at):
    with pytest.raises(Crash):
        train(tmp_path, toy_step, crash_at=crash_at)
    state = train(tmp_path, toy_step)
    assert losses(tmp_path) == losses(whole[0])  # bit for bit: repr of the same float
    assert list(losses(whole[0])) == list(range(1, 13))
    equal(state, whole[1])


def test_finished_run_returns_at_once(toy_step, whole):
    before = losses(whole[0])
    state = train(whole[0], toy_step)
    assert int(state.step) == 12 and losses(whole[0]) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_leaves(toy_step, whole, tmp_path, number):
    handler = signal.getsignal(number)
    state = train(tmp_path, toy_step, at_step={6: lambda: os.kill(os.getpid(), number)})
    assert int(state.step) == 6 and signal.getsignal(number) is handler
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["4", "6"]
    equal(train(tmp_path, toy_step), whole[1])


def test_time_limit_saves_and_leaves(toy_step, tmp_path):
    state = train(tmp_path, toy_step, loop=LoopConfig(total_steps=12, max_minutes=1e-9))
    assert int(state.step) == 1
    assert os.listdir(tmp_path / "checkpoints") == ["1"]


def test_only_the_last_checkpoints_are_kept(whole):
    assert sorted(os.listdir(whole[0] / "checkpoints"), key=int) == ["8", "12"]


def test_single_bad_step_is_skipped_and_named(toy_step, tmp_path, caplog):
    state = train(tmp_path, toy_step, spoil={5})
    assert int(state.step) == 12 and int(state.bad_steps) == 0
    assert "step 5: non-finite grad_norm = nan, loss = nan, loss_toy = nan" in caplog.text
    assert losses(tmp_path)[5] == "nan"
    assert all(np.isfinite(np.asarray(value)).all() for value in state.params.values())


def test_run_of_bad_steps_stops_and_keeps_the_good_checkpoint(toy_step, tmp_path):
    with pytest.raises(NonFiniteLossError, match="step 8: non-finite .*loss_toy = nan.* 3 such steps in a row"):
        train(tmp_path, toy_step, spoil={6, 7, 8, 9})
    assert os.listdir(tmp_path / "checkpoints") == ["4"]
    weights, info = load_run_weights(tmp_path)
    assert info["step"] == 4 and all(np.isfinite(value).all() for value in weights.values())


def test_bad_step_at_save_time_is_not_saved(toy_step, tmp_path):
    train(tmp_path, toy_step, spoil={4}, loop=LoopConfig(total_steps=5, save_every=4))
    assert os.listdir(tmp_path / "checkpoints") == ["5"]


def test_checkpoint_of_another_model_names_the_keys(toy_step, whole):
    other = {"model": {"width": 32, "depths": (1, 2), "extra": 1}, "optim": {"learning_rate": 0.01}}
    with pytest.raises(CheckpointMismatchError) as error:
        train(whole[0], toy_step, config=other)
    message = str(error.value)
    assert "model.width: checkpoint has 16, this run 32" in message
    assert "model.extra: checkpoint has '<absent>', this run 1" in message
    assert "depths" not in message and "--workdir" in message


def test_fields_younger_than_the_checkpoint_do_not_prevent_resuming(toy_step, whole):
    """A field that is added to a configuration later has its default in old runs."""
    now = CONFIG | {"model": CONFIG["model"] | {"epsilon": 1e-5}}
    with pytest.raises(CheckpointMismatchError, match="epsilon"):
        Checkpointer(whole[0], config=now).restore(toy_step.abstract_state, toy.toy_batches())

    def complete(stored):
        return stored | {"model": {"epsilon": 1e-5} | stored["model"]}

    checkpointer = Checkpointer(whole[0], config=now, complete=complete)
    equal(checkpointer.restore(toy_step.abstract_state, toy.toy_batches()), whole[1])


def test_changed_optimiser_setting_is_only_reported(toy_step, whole, caplog):
    train(whole[0], toy_step, config=CONFIG | {"optim": {"learning_rate": 0.02}})
    assert "optim.learning_rate: checkpoint has 0.01, this run 0.02" in caplog.text


def test_differences_of_nested_values():
    lines = differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5})
    assert sorted(lines) == ["a.c", "d", "e"]


def test_restore_without_checkpoint(toy_step, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        Checkpointer(tmp_path, config=CONFIG).restore(toy_step.abstract_state, toy.toy_batches())
    with pytest.raises(FileNotFoundError, match="not the workdir of a run"):
        load_run_weights(tmp_path / "nowhere")


def test_weights_of_a_run_are_the_averages(whole):
    workdir, state = whole
    weights, info = load_run_weights(workdir)
    equal(weights, state.weights(average=True))
    equal(load_run_weights(workdir, average=False)[0], state.weights())
    assert info["config"]["model"]["width"] == 16


def test_restore_to_other_devices(make_step, tmp_path):
    one = make_step()
    state = train(tmp_path, one, loop=LoopConfig(total_steps=2))
    eight = make_step(devices=8, model=2)
    checkpointer = Checkpointer(tmp_path, config=CONFIG)
    restored = checkpointer.restore(eight.abstract_state, toy.toy_batches())
    checkpointer.close()
    equal(restored, state)
    assert restored.params["mlp.0.kernel"].sharding == eight.shardings.params["mlp.0.kernel"]


def test_hooks_run_on_their_steps_and_at_the_end(toy_step, tmp_path):
    seen = []
    hook = Hook(5, lambda state: seen.append(int(state.step)))
    train(tmp_path, toy_step, hooks=[hook])
    assert seen == [5, 10, 12]


@pytest.mark.parametrize("crash_at", [None, 7])
def test_hooks_that_look_at_the_weights_change_nothing(toy_step, whole, tmp_path, crash_at):
    def look(state):
        weights = state.weights(average=True)
        toy_step.model.merge(weights, weights)
        assert jax.jit(lambda x: jax.random.normal(jax.random.key(0), x.shape) @ x.T)(weights["mlp.0.kernel"]).size

    if crash_at:
        with pytest.raises(Crash):
            train(tmp_path, toy_step, hooks=[Hook(3, look)], crash_at=crash_at)
    equal(train(tmp_path, toy_step, hooks=[Hook(3, look)]), whole[1])
    assert losses(tmp_path) == losses(whole[0])


def test_interrupted_run_does_not_wait_for_hooks(toy_step, tmp_path):
    seen = []
    hooks = [Hook(1, lambda state: seen.append(int(state.step)))]
    train(tmp_path, toy_step, hooks=hooks, at_step={3: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    train(tmp_path, toy_step, hooks=hooks, loop=LoopConfig(total_steps=12, max_minutes=1e-9))
    assert seen == [1, 2]
    assert int(train(tmp_path, toy_step, hooks=hooks, loop=LoopConfig(total_steps=5, max_minutes=1e-9)).step) == 5
    assert seen == [1, 2, 5]


def test_rates_are_logged(toy_step, whole):
    lines = [json.loads(line) for line in (whole[0] / "metrics.jsonl").read_text().splitlines()]
    rates = {"steps_per_s", "images_per_s", "images_per_s_per_chip", "tflops_per_s_per_chip", "eta_s"}
    assert rates <= set(lines[1]) and "mfu" not in lines[1]


@pytest.mark.parametrize(("window", "total"), [((2, 2), 4), ((3, 9), 4)], ids=["inside", "cut short"])
def test_profile_of_some_steps(toy_step, tmp_path, window, total):
    loop = LoopConfig(total_steps=total, profile_steps=window)
    train(tmp_path, toy_step, loop=loop, profile_dir=tmp_path / "profile")
    assert len(list(tmp_path.glob("profile/**/*.xplane.pb"))) == 1


def test_profile_needs_a_folder_and_steps_to_come(toy_step, whole, tmp_path, caplog):
    with pytest.raises(ValueError, match="no folder is given"):
        train(tmp_path, toy_step, loop=LoopConfig(total_steps=4, profile_steps=(2, 2)))
    train(whole[0], toy_step, loop=LoopConfig(total_steps=12, profile_steps=(2, 2)), profile_dir=tmp_path / "profile")
    assert "nothing is profiled" in caplog.text and not (tmp_path / "profile").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log_every": 0}, "loop.log_every is 0; it must be at least 1"),
        ({"eval_every": -1}, "loop.eval_every is -1"),
        ({"profile_steps": (3,)}, "give first step and number of steps"),
        ({"profile_steps": (0, 2)}, "give first step and number of steps"),
    ],
)
def test_impossible_cadence_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoopConfig(total_steps=1, **options)


@pytest.mark.parametrize(("seconds", "text"), [(45, "45 s"), (720, "12 min"), (11_100, "3 h 05 min")])
def test_durations(seconds, text):
    assert duration(seconds) == text
