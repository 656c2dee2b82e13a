"""Evaluates a model: predictions to files in the official formats, files to numbers and pictures.

`eval.py` calls `run`; a training run calls `predict` and `score`, so there is one way to a score.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from PIL import Image
from rich.console import Console
from rich.table import Table

from esg_jax.config import to_dict
from esg_jax.evaluation import report
from esg_jax.evaluation.metrics.errors import EvaluationError
from esg_jax.evaluation.tasks.task import EvalTask, ModelRun
from esg_jax.evaluation.workers import progress
from esg_jax.inference.bundle import Bundle, open_bundle
from esg_jax.viz import comparison_grid


def run(
    task: EvalTask,
    *,
    checkpoint: str | Path | None = None,
    workdir: str | Path | None = None,
    predictions: Sequence[str | Path] | None = None,
    out: str | Path | None = None,
    before: Sequence[str | Path] = (),
    views: int | None = None,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    workers: int = 1,
) -> None:
    """Predicts unless predictions are given, scores, prints.

    Args:
        task: what is evaluated.
        checkpoint: weights; default: those that a training run left in `workdir`.
        workdir: folder of a training run.
        predictions: saved predictions to score again, without a model.
        out: folder for predictions and results; default: `workdir`/eval.
        before: saved predictions of an earlier evaluation of the same images, drawn beside those of this one.
        views: replaces that of the task.
        dtype: precision of the network.
        mesh: devices that share weights and images; default: one device.
        workers: processes that score.

    Raises:
        ValueError, FileNotFoundError: what is missing or does not fit, in one line.
    """
    if out is None and workdir is None:
        raise EvaluationError("say where to write: --out FOLDER")
    out = Path(out or Path(workdir) / "eval")
    if views is not None:
        if not hasattr(task, "views"):
            raise EvaluationError(f"task {task.name!r} has no views")
        task = dataclasses.replace(task, views=views)
    before = [Path(name) for name in before or ()]
    if missing := [str(path) for path in before if not path.is_file()]:
        raise EvaluationError(f"no earlier predictions at {missing[0]}")
    if predictions:
        files = [Path(name) for name in predictions]
    else:
        files = predict(task, open_bundle(weights_of(checkpoint, workdir), dtype=dtype, mesh=mesh), out)
        if jax.process_index():
            return
    scores = score(task, files, out, workers=workers, before=before)
    print_scores(task, scores)
    if task.grid_images:
        print(f"predictions beside the ground truth: {out / 'grid.png'}")
    print(f"all numbers: {out / 'results.json'}")


def weights_of(checkpoint: str | Path | None, workdir: str | Path | None) -> Path:
    """The weights to evaluate."""
    if checkpoint:
        return Path(checkpoint)
    if workdir is None:
        raise EvaluationError("give --checkpoint FILE, --workdir FOLDER, or --predictions FILES to score again")
    path = Path(workdir) / "model.safetensors"
    if not path.is_file():
        raise EvaluationError(f"{path} does not exist yet; train.py writes it when it stops")
    return path


def predict(task: EvalTask, bundle: Bundle, out: Path) -> list[Path]:
    """Predictions as files, one per process; all processes must call it, and share the work.

    Args:
        task: what is evaluated.
        bundle: weights of a file, or of a training state where they are.
        out: folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    truth, index, count = task.truth(), jax.process_index(), jax.process_count()
    files = [out / f"predictions{f'.{i}' if i else ''}.json" for i in range(count)]
    with progress(task.name, len(truth.images)) as advance:
        files[index].write_text(json.dumps(task.predict(truth, ModelRun(bundle, out, advance))))
    if count > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("predictions written")
    return files


def score(
    task: EvalTask, files: Sequence[Path], out: Path, *, workers: int = 1, before: Sequence[Path] = ()
) -> dict[str, Any]:
    """Scores of saved predictions, written to results.json; grid.png shows some beside the ground truth.

    Args:
        task: what is evaluated.
        files: predictions, one file per process that predicted.
        out: folder.
        workers: processes that score.
        before: predictions of an earlier evaluation, drawn as well.
    """
    out.mkdir(parents=True, exist_ok=True)
    truth = task.truth()
    scores = task.score(truth, files, workers=workers)
    about = {"config": to_dict(task), "predictions": [str(file) for file in files]}
    report.write_json({**about, **scores}, out / "results.json")
    if task.grid_images:
        runs = {"before": before, "after": files} if before else {"prediction": files}
        grid = comparison_grid({title: task.draw(truth, drawn) for title, drawn in runs.items()})
        Image.fromarray(grid).save(out / "grid.png")
    return scores


def print_scores(task: EvalTask, scores: dict[str, Any]) -> None:
    """One row for the set and one for every group; fractions as percentages."""
    file = Path(task.file)
    table = Table(title=f"{task.name}, {file.name}")
    for name in ("", *task.columns):
        table.add_column(name, justify="right" if name else "left")
    rows = {"all": scores["metrics"], **scores.get("groups", {})}
    for name, result in rows.items():
        table.add_row(name, *(report.format_value(result[column]) for column in task.columns))
    Console(width=max(100, 12 * len(task.columns))).print(table)
    print(report.markdown_row(file.stem, scores["metrics"], task.columns))
