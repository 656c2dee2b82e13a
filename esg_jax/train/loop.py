"""The training loop: next batch, step, report one step late, save, evaluate."""

import dataclasses
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from esg_jax.sharding import put_batch
from esg_jax.train.checkpoint import Checkpointer
from esg_jax.train.flops import peak_flops
from esg_jax.train.logging import MetricWriter, Progress, log_progress
from esg_jax.train.state import TrainState
from esg_jax.train.step import TrainStep

log = logging.getLogger(__name__)


class NonFiniteLossError(RuntimeError):
    """Too many steps in a row had a non-finite loss or gradient."""


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Cadence of a run, in steps.

    Attributes:
        total_steps: the run ends here.
        log_every: a line and an entry of averages over the interval.
        save_every: a checkpoint; the end of the run, an evaluation and a stop signal save as well.
        eval_every: an evaluation of the weights (the averages, if the run keeps them); the end of the run evaluates as
            well. 0 for none. `train.py --eval` says what is evaluated.
        profile_steps: (first step, number of steps) of which `jax.profiler` writes a trace to workdir/profile; off if
            the number is 0. The first steps of a run compile, so choose later ones.
        max_bad_steps: non-finite steps in a row after which the run stops with an error.
        max_minutes: saves and returns after this much time, so that a later call goes on; 0 for no limit.
    """

    total_steps: int
    log_every: int = 50
    save_every: int = 1000
    eval_every: int = 0
    profile_steps: tuple[int, int] = (0, 0)
    max_bad_steps: int = 10
    max_minutes: float = 0.0

    def __post_init__(self):
        for name, least in (("log_every", 1), ("save_every", 1), ("eval_every", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"loop.{name} is {getattr(self, name)}; it must be at least {least}")
        window = tuple(self.profile_steps)
        if len(window) != 2 or window[1] < 0 or (window[1] and window[0] < 1):
            raise ValueError(f'loop.profile_steps is {window}; give first step and number of steps, such as "(10, 3)"')


@dataclasses.dataclass(frozen=True)
class Hook:
    """Something done every few steps and after the last, such as an evaluation; it only reads the state."""

    every: int
    run: Callable[[TrainState], None]


class StopSignal:
    """Turns SIGTERM (preemption) and the first Ctrl-C into a request to save and leave after the current step."""

    def __init__(self):
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, _frame):
        log.warning("%s: saving, then leaving", signal.Signals(number).name)
        self.requested = True
        if number == signal.SIGINT:  # a second Ctrl-C interrupts at once
            signal.signal(signal.SIGINT, self._previous[signal.SIGINT])

    def agreed(self, step: int) -> bool:
        """Whether to stop now; all hosts of a pod get the same answer at the same step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.requested


def fit(
    state: TrainState,
    step_fn: TrainStep,
    batches: Iterator[Mapping[str, np.ndarray]],
    config: LoopConfig,
    *,
    writer: MetricWriter,
    checkpointer: Checkpointer | None = None,
    hooks: Sequence[Hook] = (),
    profile_dir: str | Path | None = None,
) -> TrainState:
    """Trains until `config.total_steps`, a stop signal, or the time limit.

    Args:
        state: where to start, e.g. restored; consumed.
        step_fn: the compiled step.
        batches: this process's part of every batch; as a Grain iterator it is saved with the state. Nothing is read
            ahead here, so its position always belongs to the state.
        config: cadence and limits.
        writer: receives averages over `log_every` steps.
        checkpointer: saves; None keeps nothing.
        hooks: run after saving, so that a crash in an evaluation costs no training; not when the run is interrupted.
        profile_dir: where the trace of `config.profile_steps` goes.

    Returns:
        The last state; its `step` tells whether the run is finished.

    Raises:
        NonFiniteLossError: `max_bad_steps` non-finite steps in a row. Their updates were skipped and nothing was saved
            since, so the last checkpoint is good.
        ValueError: the batch does not divide over the mesh.
    """
    start_step, start_time = int(state.step), time.monotonic()
    report = _Report(config, writer, step_fn.mesh)
    pending: tuple[int, Any, float] | None = None
    with StopSignal() as stop, _Profiler(config.profile_steps, profile_dir, start_step) as profiler:
        for number in range(start_step + 1, config.total_steps + 1):
            profiler.before(number)
            batch = next(batches)
            if number == start_step + 1:
                report.batch_size = len(batch["image"]) * jax.process_count()
                log.info("compiling the training step ...")
            with jax.profiler.StepTraceAnnotation("train", step_num=number):
                inputs = put_batch(step_fn.task.inputs(batch), step_fn.mesh)
                state, metrics = step_fn(state, inputs)
            # Metrics of the step before, so that reading them never waits for the step just started.
            if pending is not None:
                report(*pending)
            pending = (number, metrics, step_fn.flops(state, inputs))
            if profiler.after(number, metrics):
                report.restart(number)

            out_of_time = 0 < config.max_minutes * 60 < time.monotonic() - start_time
            finished = number == config.total_steps
            interrupted = stop.agreed(number) or (out_of_time and not finished)
            due = [hook for hook in hooks if not interrupted and (finished or number % hook.every == 0)]
            if finished or interrupted or due or number % config.save_every == 0:
                report(*pending)  # a bad step raises or is known here, before anything is saved
                pending = None
                if checkpointer is not None and not report.bad:
                    checkpointer.save(state, batches)
                for hook in due:
                    hook.run(state)
                report.restart(number)
            if interrupted:
                break
    return state


class _Profiler:
    """Writes the trace of a few steps."""

    def __init__(self, window: tuple[int, int], folder: str | Path | None, start_step: int):
        self._first, count = window
        self._last, self._folder, self._running = self._first + count - 1, folder, False
        if count and folder is None:
            raise ValueError("profile_steps is set, but no folder is given for the trace")
        if count and self._first <= start_step:
            log.warning("nothing is profiled: loop.profile_steps is %s, the run goes on at %d", window, start_step + 1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stop()  # a run that ends inside the window keeps its trace

    def before(self, step: int) -> None:
        if step == self._first <= self._last:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, outputs: Any) -> bool:
        """Whether the trace was written just now."""
        if not self._running or step < self._last:
            return False
        jax.block_until_ready(outputs)  # steps run asynchronously
        self._stop()
        log.info("trace of steps %d to %d in %s", self._first, self._last, self._folder)
        return True

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


class _Report:
    """Averages metrics over an interval, watches for non-finite steps."""

    def __init__(self, config: LoopConfig, writer: MetricWriter, mesh: Mesh):
        self.batch_size = 0
        self.bad = False
        self._config, self._writer, self._mesh = config, writer, mesh
        self._progress: Progress | None = None
        self._sums: dict[str, float] = {}
        self._count = 0

    def restart(self, step: int) -> None:
        if self._progress is not None:
            self._progress.restart(step)

    def __call__(self, step: int, metrics: Mapping[str, jax.Array], flops: float) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        bad_steps = int(values.pop("bad_steps"))
        self.bad = bad_steps > 0
        if self._progress is None:
            peak = peak_flops(self._mesh.devices.flat[0])
            self._progress = Progress(self._config.total_steps, self.batch_size, chips=self._mesh.size, peak_flops=peak)
            self._progress.restart(step)
        self._progress.add(step, flops)
        if self.bad:
            self._warn(step, bad_steps, values)
        else:
            self._count += 1
            for name, value in values.items():
                self._sums[name] = self._sums.get(name, 0.0) + value
        if (step % self._config.log_every == 0 or step == self._config.total_steps) and self._count:
            means = {name: total / self._count for name, total in self._sums.items()}
            means["learning_rate"] = values["learning_rate"]
            rates = self._progress.measure(step)
            self._writer.write(step, means | rates)
            log_progress(step, self._config.total_steps, means, rates)
            self._sums, self._count = {}, 0

    def _warn(self, step: int, bad_steps: int, values: Mapping[str, float]) -> None:
        terms = [f"{name} = {value}" for name, value in values.items() if not np.isfinite(value)]
        message = f"step {step}: non-finite {', '.join(terms)}"
        self._writer.write(step, {"bad_steps": bad_steps} | values)
        limit = self._config.max_bad_steps
        if bad_steps >= limit:
            raise NonFiniteLossError(
                f"{message}. That makes {bad_steps} such steps in a row; the last checkpoint is from before them. "
                "Lower config.optim.learning_rate, set config.optim.warmup_steps, or look at the data of these steps."
            )
        log.warning("%s; update skipped (%d in a row, the run stops at %d)", message, bad_steps, limit)
