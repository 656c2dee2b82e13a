"""Where numbers of a run go: one JSON line per entry, one readable line on the terminal, TensorBoard if asked for."""

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path

import jax

log = logging.getLogger(__name__)


class MetricWriter:
    """Writes scalars of the first process; the other processes of a pod write nothing."""

    def __init__(self, workdir: str | Path, *, tensorboard: bool = False):
        """Appends to `workdir/metrics.jsonl`, so a resumed run continues its own file.

        Raises:
            ImportError: `tensorboard` without the tensorboardX package.
        """
        self._active = jax.process_index() == 0
        self._tensorboard = None
        if not self._active:
            return
        Path(workdir).mkdir(parents=True, exist_ok=True)
        self._file = open(Path(workdir) / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115 (closed in close)
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError as error:
                raise ImportError("config.tensorboard needs tensorboardX: pip install 'esg_jax[log]'") from error
            self._tensorboard = SummaryWriter(str(workdir))

    def write(self, step: int, values: Mapping[str, float], *, prefix: str = "") -> None:
        """One entry; non-finite values are written as strings, because JSON has none."""
        if not self._active:
            return
        entry = {"step": step}
        entry |= {prefix + key: value if math.isfinite(value) else str(value) for key, value in values.items()}
        self._file.write(json.dumps(entry) + "\n")
        if self._tensorboard is not None:
            for key, value in values.items():
                self._tensorboard.add_scalar(prefix + key, value, step)

    def close(self) -> None:
        """Flushes everything."""
        if self._active:
            self._file.close()
            if self._tensorboard is not None:
                self._tensorboard.close()


class Progress:
    """Rates and the time that remains, measured between reports."""

    def __init__(self, total_steps: int, batch_size: int):
        self._total, self._batch = total_steps, batch_size
        self._step: int | None = None
        self._time = 0.0

    def restart(self, step: int) -> None:
        """Measures from here; called after compilation, checkpoints and evaluations, which are not training time."""
        self._step, self._time = step, time.perf_counter()

    def measure(self, step: int) -> dict[str, float]:
        """steps/s, images/s and seconds left, since the last call; empty if nothing was done in between."""
        if self._step is None or step <= self._step:
            self.restart(step)
            return {}
        rate = (step - self._step) / max(time.perf_counter() - self._time, 1e-9)
        self.restart(step)
        return {"steps_per_s": rate, "images_per_s": rate * self._batch, "eta_s": (self._total - step) / rate}


def log_progress(step: int, total: int, values: Mapping[str, float], rates: Mapping[str, float]) -> None:
    """The line a person reads."""
    parts = [f"step {step}/{total}", f"loss {values['loss']:.3f}", f"lr {values['learning_rate']:.2e}"]
    parts.append(f"grad norm {values['grad_norm']:.3g}")
    if rates:
        parts.append(f"{rates['steps_per_s']:.3g} steps/s")
        parts.append(f"{rates['images_per_s']:.3g} images/s")
        parts.append(f"{duration(rates['eta_s'])} left")
    log.info("%s", ", ".join(parts))


def duration(seconds: float) -> str:
    """Short readable time: 45 s, 12 min, 3 h 05 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
