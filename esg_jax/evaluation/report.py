"""Results as JSON, printed table, markdown row and plots."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from esg_jax.evaluation.metrics.errors import EvaluationError


def write_json(result: Mapping[str, Any], path: str | Path) -> None:
    """Writes `result`; NaN becomes null, so that any JSON reader takes it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain(result), indent=1, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """`value` in JSON types; NaN and infinities become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def headline(result: Mapping[str, Any]) -> dict[str, float]:
    """The scalar entries of `result`."""
    return {k: v for k, v in result.items() if isinstance(v, (int, float, np.number)) and not isinstance(v, bool)}


def print_table(title: str, result: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints the scalar entries, fractions as percentages the way papers do."""
    table = Table(title=title)
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in headline(result).items():
        table.add_row(name, format_value(value))
    (console or Console()).print(table)


def format_value(value: float, decimals: int = 2) -> str:
    """A fraction as a percentage; counts as they are; "-" when undefined."""
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return str(value)
    # -1 is the official mark of an empty bucket.
    if value is None or not math.isfinite(value) or value == -1:
        return "-"
    return f"{100 * value if abs(value) <= 1 else value:.{decimals}f}"


def markdown_row(label: str, result: Mapping[str, Any], columns: Sequence[str]) -> str:
    """Header, rule and one row of a markdown table, values x100 with one decimal as in the papers."""
    values = headline(result)
    missing = [c for c in columns if c not in values]
    if missing:
        raise EvaluationError(f"the result has no {missing[0]!r}; it has {', '.join(values)}")
    cells = [format_value(values[c], 1) for c in columns]
    rows = [["method", *columns], ["---"] * (len(columns) + 1), [label, *cells]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def write_curves(metric: Any, result: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Draws what the metric supports into `folder`: precision-recall, recall over IoU, bars per class.

    Raises:
        EvaluationError: matplotlib is not installed, or the metric has nothing to draw.
    """
    try:
        import matplotlib
    except ImportError:
        raise EvaluationError("--curves needs matplotlib: pip install 'esg_jax[eval]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []

    def save(name, draw, xlabel, ylabel):
        figure, axes = pyplot.subplots(figsize=(6, 4.5), layout="constrained")
        draw(axes)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.grid(alpha=0.3)
        figure.savefig(folder / name, dpi=150)
        pyplot.close(figure)
        written.append(folder / name)

    if hasattr(metric, "curves"):
        precision = np.array([c.precision[0] for c in metric.curves().values()])  # (classes, IoU, recall)

        def draw_pr(axes):
            recall = np.linspace(0, 1, precision.shape[-1])
            for t in range(0, precision.shape[1], 2):
                values = np.where(precision[:, t] > -1, precision[:, t], np.nan)
                axes.plot(recall, np.nanmean(values, axis=0), label=f"IoU {0.5 + 0.05 * t:.2f}")
            axes.set(xlim=(0, 1), ylim=(0, 1.02))
            axes.legend()

        if (precision > -1).any():
            save("precision_recall.png", draw_pr, "recall", "precision, mean over classes")
    for name, values in result.items():
        if name.startswith("AR") and name.endswith("_per_iou"):
            iou = np.linspace(0.5, 0.95, len(values))
            save(
                "recall_over_iou.png",
                lambda axes, x=iou, y=values: (axes.plot(x, y, marker="o"), axes.set(ylim=(0, 1.02))),
                "IoU threshold",
                name.removesuffix("_per_iou"),
            )
        elif "per_c" in name and len(values) > 1:
            pairs = values.items() if isinstance(values, Mapping) else enumerate(values)
            bars = {str(k): v.get("PQ") if isinstance(v, Mapping) else v for k, v in pairs}
            bars = {k: v for k, v in bars.items() if isinstance(v, (int, float)) and math.isfinite(v) and v > -1}
            if bars:
                quantity = "PQ per class" if name == "per_class" else name.replace("_", " ")
                save(f"{name}.png", lambda axes, b=bars: _draw_bars(axes, b), "", quantity)
    if hasattr(metric, "draw"):
        for name, draw, xlabel, ylabel in metric.draw():
            save(name, draw, xlabel, ylabel)
    if not written:
        raise EvaluationError("this metric has no curves")
    return written


def _draw_bars(axes: Any, bars: Mapping[str, float]) -> None:
    """Best class first; names only while they stay readable."""
    ordered = sorted(bars.items(), key=lambda item: -item[1])
    axes.bar(range(len(ordered)), [v for _, v in ordered])
    if len(ordered) <= 60:
        axes.set_xticks(range(len(ordered)), [k for k, _ in ordered], rotation=90, fontsize=7)
