"""Label maps built from many run-length masks at once.

Decoding every entity of a photo into its own full-size mask costs (entities x pixels); entities that do not overlap fit
into one label map, which is painted once and resized once.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Integer


def label_layers(
    counts: Sequence[Integer[np.ndarray, "runs"]], height: int, width: int
) -> list[Int[np.ndarray, "height width"]]:
    """Label maps that together hold every entity of the run lengths `counts`, see `MaskSet.layers`.

    Entities without mutual overlap share one map; an entity goes into the first map in which its pixels are free.
    Each entity lies in exactly one map.
    """
    dtype = np.uint8 if len(counts) < 255 else np.int32
    layers: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # sorted runs of a map: start, end, value
    runs = [_foreground_runs(entity) for entity in counts]
    pending = list(range(len(counts)))
    while pending:
        layer = _merge_runs([runs[index] for index in pending], pending)
        if not _disjoint(layer):
            layer, pending = _greedy_layer(runs, pending)
        else:
            pending = []
        layers.append(layer)
    return [_paint(layer, height, width, dtype) for layer in layers]


def _foreground_runs(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ends = np.cumsum(counts)[1::2]
    starts = ends - counts[1::2]
    filled = ends > starts
    return starts[filled], ends[filled]


def _merge_runs(runs: Sequence[tuple[np.ndarray, np.ndarray]], indices: Sequence[int]):
    starts = np.concatenate([start for start, _ in runs])
    ends = np.concatenate([end for _, end in runs])
    values = np.repeat(np.asarray(indices) + 1, [len(start) for start, _ in runs])
    order = np.argsort(starts, kind="stable")
    return starts[order], ends[order], values[order]


def _disjoint(layer) -> bool:
    starts, ends, _ = layer
    return bool((starts[1:] >= ends[:-1]).all())


def _greedy_layer(runs, pending):
    layer = _merge_runs([runs[pending[0]]], [pending[0]])
    rest = []
    for index in pending[1:]:
        start, end = runs[index]
        # A run is free when as many runs of the map start before its end as end at or before its start.
        free = np.searchsorted(layer[0], end, side="left") == np.searchsorted(layer[1], start, side="right")
        if not free.all():
            rest.append(index)
            continue
        value = np.full(len(start), index + 1)
        order = np.argsort(np.concatenate([layer[0], start]), kind="stable")
        old_start, old_end, old_value = layer
        layer = (
            np.concatenate([old_start, start])[order],
            np.concatenate([old_end, end])[order],
            np.concatenate([old_value, value])[order],
        )
    return layer, rest


def _paint(layer, height: int, width: int, dtype) -> np.ndarray:
    starts, ends, values = layer
    # Alternate gap and run: gap lengths carry the value 0.
    lengths = np.empty(2 * len(starts) + 1, np.int64)
    lengths[0:-1:2] = starts - np.concatenate([[0], ends[:-1]])
    lengths[1::2] = ends - starts
    lengths[-1] = height * width - (ends[-1] if len(ends) else 0)
    painted = np.zeros(len(lengths), dtype)
    painted[1::2] = values
    return np.repeat(painted, lengths).reshape(width, height).T
