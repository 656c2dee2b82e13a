"""Runs a streaming metric over many images: progress bar, worker processes, exact merging."""

import contextlib
import copy
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from esg_jax.evaluation.metrics.accumulator import Accumulator

Metric = TypeVar("Metric", bound=Accumulator)


@contextlib.contextmanager
def progress(description: str, total: int, *, show: bool | None = None) -> Iterator[Callable[[int], None]]:
    """Progress bar with the time left; yields `advance(steps)`. `show=None`: only when attached to a terminal."""
    show = sys.stderr.isatty() if show is None else show
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    from rich.console import Console

    with Progress(*columns, console=Console(stderr=True), disable=not show) as bar:
        task = bar.add_task(description, total=total)
        yield lambda steps=1: bar.advance(task, steps)


def accumulate(
    metric: Metric,
    items: Sequence[Any],
    add: Callable[[Metric, Any], None],
    *,
    workers: int = 1,
    description: str = "scoring",
    show: bool | None = None,
) -> Metric:
    """`add(metric, item)` for every item, in `workers` processes, merged into `metric`.

    Args:
        metric: an accumulator; returned with everything added.
        items: picklable; cheap ones (paths, RLE records) keep the traffic between processes small.
        add: a module-level function.
        workers: 1 = in this process.
    """
    with progress(description, len(items), show=show) as advance:
        if workers <= 1 or len(items) < 2:
            for item in items:
                add(metric, item)
                advance(1)
            return metric
        size = max(1, min(64, len(items) // (4 * workers)))
        chunks = [items[i : i + size] for i in range(0, len(items), size)]
        # Spawned, not forked: the caller may hold threads (JAX does).
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            blank = copy.deepcopy(metric)
            jobs = [pool.submit(_run_chunk, blank, chunk, add) for chunk in chunks]
            for job in as_completed(jobs):
                part = job.result()
                metric.merge(part)
                advance(len(part))
    return metric


def _run_chunk(metric: Metric, items: Sequence[Any], add: Callable[[Metric, Any], None]) -> Metric:
    for item in items:
        add(metric, item)
    return metric
