"""COCO run-length encoding as numpy runs, and label maps built from many encodings at once.

A COCO RLE lists the lengths of alternating 0 and 1 runs of the mask in column-major order. Decoding every entity of
a photo into its own full-size mask costs (entities x pixels); entities that do not overlap fit into one label map,
which is painted once and resized once.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Int64, Integer
from pycocotools import mask as coco_mask


def counts_from_string(counts: bytes | str) -> Int64[np.ndarray, "runs"]:
    """Run lengths of a compressed COCO RLE string.

    Each number is written in groups of five bits, least significant first, one character (offset 48) per group, bit 5
    set when another group follows, bit 4 of the last group being the sign. From the fourth on, numbers are
    differences to the number two places before.

    Raises:
        ValueError: the string is cut off in the middle of a number, or holds a character that no encoder writes.
    """
    data = counts.encode("ascii") if isinstance(counts, str) else bytes(counts)
    groups = np.frombuffer(data, np.uint8).astype(np.int64) - 48
    if groups.size == 0:
        return np.zeros(0, np.int64)
    if groups.min() < 0 or groups.max() > 63:
        raise ValueError("RLE counts hold a character outside the COCO alphabet")
    last = (groups & 0x20) == 0
    if not last[-1]:
        raise ValueError("RLE counts are cut off in the middle of a number")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    place = np.arange(groups.size) - np.repeat(starts, lengths)
    values = np.add.reduceat((groups & 0x1F) << (5 * place), starts)
    negative = (groups[ends] & 0x10) != 0
    values = values - np.where(negative, np.int64(1) << (5 * lengths), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def counts_of(segmentation: Any, height: int, width: int) -> Int64[np.ndarray, "runs"]:
    """Run lengths of a COCO ``segmentation`` field: compressed RLE, uncompressed RLE or a list of polygons.

    Raises:
        ValueError: unknown form, RLE of another size than (height, width), or runs that do not fill the image.
    """
    if isinstance(segmentation, Mapping):
        if "counts" not in segmentation or "size" not in segmentation:
            raise ValueError("RLE segmentation needs the keys 'size' and 'counts'")
        if tuple(segmentation["size"]) != (height, width):
            raise ValueError(
                f"RLE has size {tuple(segmentation['size'])} (height, width), its image has {(height, width)}"
            )
        counts = segmentation["counts"]
        runs = counts_from_string(counts) if isinstance(counts, str | bytes) else np.asarray(counts, np.int64)
    elif isinstance(segmentation, Sequence) and not isinstance(segmentation, str | bytes):
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
        if not polygons:
            return np.array([height * width], np.int64)
        merged = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
        runs = counts_from_string(merged["counts"])
    else:
        raise ValueError(f"segmentation is a {type(segmentation).__name__}, expected RLE or a list of polygons")
    if runs.size and runs.min() < 0 or int(runs.sum()) != height * width:
        raise ValueError(f"RLE runs fill {int(runs.sum())} pixels, the image has {height * width}")
    return runs


def area(counts: Integer[np.ndarray, "runs"]) -> int:
    """Number of foreground pixels."""
    return int(counts[1::2].sum())


def decode(counts: Integer[np.ndarray, "runs"], height: int, width: int) -> Bool[np.ndarray, "height width"]:
    """Boolean mask of one entity."""
    values = np.zeros(len(counts), bool)
    values[1::2] = True
    return np.repeat(values, counts).reshape(width, height).T


def encode_label_map(
    labels_hw: Integer[np.ndarray, "height width"], count: int
) -> tuple[list[dict[str, Any]], Int[np.ndarray, "count"]]:
    """COCO compressed RLEs of the regions 1..count of a label map, and their areas in pixels."""
    height, width = labels_hw.shape
    flat = labels_hw.ravel(order="F")
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    ends = np.append(starts[1:], flat.size)
    values = flat[starts]
    order = np.argsort(values, kind="stable")
    bounds = np.searchsorted(values[order], np.arange(1, count + 2))
    rles, areas = [], np.zeros(count, np.int64)
    for index in range(count):
        runs = order[bounds[index] : bounds[index + 1]]
        edges = np.stack([starts[runs], ends[runs]], axis=1).ravel()
        counts = np.diff(np.concatenate([[0], edges, [flat.size]]))
        rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
        rles.append({"size": [height, width], "counts": rle["counts"].decode("ascii")})
        areas[index] = area(counts)
    return rles, areas


def bounding_box(encoded: dict[str, Any]) -> list[int]:
    """COCO ``bbox`` (x, y, width, height) in pixels of a compressed RLE dictionary."""
    return [int(value) for value in coco_mask.toBbox(encoded)]


def label_layers(
    counts: Sequence[Integer[np.ndarray, "runs"]], height: int, width: int
) -> list[Int[np.ndarray, "height width"]]:
    """Label maps that together hold every entity: value k + 1 marks entity k, 0 nothing.

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
