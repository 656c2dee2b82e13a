"""The training loop: next batch, step, report one step late, save, evaluate."""

import dataclasses
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from esg_jax.train.checkpoint import Checkpointer
from esg_jax.train.logging import MetricWriter, Progress, log_progress
from esg_jax.train.sharding import put_batch
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
        save_every: a checkpoint; the end of the run and a stop signal save as well.
        max_bad_steps: non-finite steps in a row after which the run stops with an error.
        max_minutes: saves and returns after this much time, so that a later call goes on; 0 for no limit.
    """

    total_steps: int
    log_every: int = 50
    save_every: int = 1000
    max_bad_steps: int = 10
    max_minutes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Hook:
    """Something done every few steps and after the last, such as an evaluation."""

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
        hooks: run after saving, so that a crash in an evaluation costs no training.

    Returns:
        The last state; its `step` tells whether the run is finished.

    Raises:
        NonFiniteLossError: `max_bad_steps` non-finite steps in a row. Their updates were skipped and nothing was saved
            since, so the last checkpoint is good.
        ValueError: the batch does not divide over the mesh.
    """
    start_step, start_time = int(state.step), time.monotonic()
    report = _Report(config, writer)
    pending: tuple[int, Any] | None = None
    with StopSignal() as stop:
        for number in range(start_step + 1, config.total_steps + 1):
            batch = next(batches)
            if number == start_step + 1:
                report.batch_size = len(batch["image"]) * jax.process_count()
                log.info("compiling the training step ...")
            with jax.profiler.StepTraceAnnotation("train", step_num=number):
                state, metrics = step_fn(state, put_batch(step_fn.task.inputs(batch), step_fn.mesh))
            # Metrics of the step before, so that reading them never waits for the step just started.
            if pending is not None:
                report(*pending)
            pending = (number, metrics)

            out_of_time = 0 < config.max_minutes * 60 < time.monotonic() - start_time
            last = number == config.total_steps or stop.agreed(number) or out_of_time
            due = [hook for hook in hooks if last or number % hook.every == 0]
            if last or due or number % config.save_every == 0:
                report(*pending)  # a bad step raises or is known here, before anything is saved
                pending = None
                if checkpointer is not None and not report.bad:
                    checkpointer.save(state, batches)
                if not stop.requested:
                    for hook in due:
                        hook.run(state)
                report.restart(number)
            if last:
                break
    return state


class _Report:
    """Averages metrics over an interval, watches for non-finite steps."""

    def __init__(self, config: LoopConfig, writer: MetricWriter):
        self.batch_size = 0
        self.bad = False
        self._config, self._writer = config, writer
        self._progress: Progress | None = None
        self._sums: dict[str, float] = {}
        self._count = 0

    def restart(self, step: int) -> None:
        if self._progress is not None:
            self._progress.restart(step)

    def __call__(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        bad_steps = int(values.pop("bad_steps"))
        self.bad = bad_steps > 0
        if self._progress is None:
            self._progress = Progress(self._config.total_steps, self.batch_size)
            self._progress.restart(step)
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
