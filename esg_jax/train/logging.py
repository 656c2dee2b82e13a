"""Where numbers of a run go: a JSON file and the terminal always, TensorBoard and Weights & Biases if asked for."""

import importlib
import json
import logging
import math
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

log = logging.getLogger(__name__)


class MetricWriter:
    """Writes scalars of the first process; the other processes of a pod write nothing."""

    def __init__(
        self,
        workdir: str | Path,
        *,
        tensorboard: bool = False,
        wandb: str = "",
        config: Mapping[str, Any] | None = None,
    ):
        """Appends to `workdir/metrics.jsonl`, so a resumed run continues its own file.

        Args:
            workdir: folder of the run.
            tensorboard: write TensorBoard files into it, too.
            wandb: name of the Weights & Biases project to log to, too; a resumed run continues its own entry there.
            config: of the run, for Weights & Biases to show.

        Raises:
            ImportError: a logger is asked for whose package is not installed.
            ValueError: Weights & Biases refuses, for example because nobody is logged in.
        """
        self._active = jax.process_index() == 0
        self._others: list[_TensorBoard | _WandB] = []
        if not self._active:
            return
        Path(workdir).mkdir(parents=True, exist_ok=True)
        if tensorboard:
            self._others.append(_TensorBoard(Path(workdir)))
        if wandb:
            self._others.append(_WandB(Path(workdir), wandb, config or {}))
        self._file = open(Path(workdir) / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115 (closed in close)

    def write(self, step: int, values: Mapping[str, float], *, prefix: str = "") -> None:
        """One entry; non-finite values are written as strings, because JSON has none."""
        if not self._active:
            return
        values = {prefix + key: value for key, value in values.items()}
        entry = {key: value if math.isfinite(value) else str(value) for key, value in values.items()}
        self._file.write(json.dumps({"step": step} | entry) + "\n")
        for other in self._others:
            other.write(step, values)

    def close(self) -> None:
        """Flushes everything."""
        if self._active:
            self._file.close()
            for other in self._others:
                other.close()


class _TensorBoard:
    def __init__(self, workdir: Path):
        self._writer = _extra("tensorboardX", "tensorboard").SummaryWriter(str(workdir))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, workdir: Path, project: str, config: Mapping[str, Any]):
        wandb = _extra("wandb", "wandb")
        id_file = workdir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project=project,
                name=workdir.name,
                id=id_file.read_text(),
                resume="allow",
                dir=str(workdir),
                config=dict(config),
            )
        except wandb.Error as error:
            raise ValueError(f"config.wandb: {error} (WANDB_MODE=offline needs neither account nor network)") from error
        # A resumed run may repeat steps, which wandb's own counter would refuse.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


def _extra(package: str, field: str) -> ModuleType:
    """An optional package, imported only when a config asks for it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"config.{field} needs {package}: pip install 'esg_jax[log]'") from error


class Progress:
    """Rates and the time that remains, measured between reports."""

    def __init__(self, total_steps: int, batch_size: int, *, chips: int = 1, peak_flops: float | None = None):
        """Starts at the first `restart`.

        Args:
            total_steps: of the run.
            batch_size: images per step on all chips.
            chips: devices that share the work.
            peak_flops: FLOP/s of one of them at most, for the utilisation; None if unknown.
        """
        self._total, self._batch, self._chips, self._peak = total_steps, batch_size, chips, peak_flops
        self._step: int | None = None
        self._time = 0.0
        self._flops = 0.0

    def restart(self, step: int) -> None:
        """Measures from here; called after compilation, checkpoints and evaluations, which are not training time."""
        self._step, self._time, self._flops = step, time.perf_counter(), 0.0

    def add(self, step: int, flops: float) -> None:
        """Adds what `step` computed; nothing if it lies before what is measured."""
        if self._step is not None and step > self._step:
            self._flops += flops

    def measure(self, step: int) -> dict[str, float]:
        """What was reached per second since the last call, and seconds left; empty if nothing was done in between.

        steps_per_s, images_per_s, images_per_s_per_chip, eta_s; tflops_per_s_per_chip if operations were added, and
        mfu, their share of the peak, where that is known.
        """
        if self._step is None or step <= self._step:
            self.restart(step)
            return {}
        seconds, flops = max(time.perf_counter() - self._time, 1e-9), self._flops
        rate = (step - self._step) / seconds
        self.restart(step)
        images = rate * self._batch
        rates = {"steps_per_s": rate, "images_per_s": images, "images_per_s_per_chip": images / self._chips}
        if flops:
            achieved = flops / seconds / self._chips
            rates["tflops_per_s_per_chip"] = achieved / 1e12
            if self._peak:
                rates["mfu"] = achieved / self._peak
        return rates | {"eta_s": (self._total - step) / rate}


def log_progress(step: int, total: int, values: Mapping[str, float], rates: Mapping[str, float]) -> None:
    """The line a person reads."""
    parts = [f"step {step}/{total}", f"loss {values['loss']:.3f}", f"lr {values['learning_rate']:.2e}"]
    parts.append(f"grad norm {values['grad_norm']:.3g}")
    if rates:
        images, share = rates["images_per_s"], rates["images_per_s_per_chip"]
        parts.append(f"{rates['steps_per_s']:.3g} steps/s")
        parts.append(f"{images:.3g} images/s" + (f" ({share:.3g} per chip)" if share < images else ""))
        if "mfu" in rates:
            parts.append(f"MFU {rates['mfu']:.1%}")
        elif "tflops_per_s_per_chip" in rates:
            parts.append(f"{rates['tflops_per_s_per_chip']:.3g} TFLOP/s" + (" per chip" if share < images else ""))
        parts.append(f"{duration(rates['eta_s'])} left")
    log.info("%s", ", ".join(parts))


def duration(seconds: float) -> str:
    """Short readable time: 45 s, 12 min, 3 h 05 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
