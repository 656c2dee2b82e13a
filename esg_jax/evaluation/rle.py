"""COCO run-length masks: encoding, decoding, and checks that `pycocotools` leaves out.

An RLE is the official dictionary ``{"size": [height, width], "counts": bytes}``; runs go down the columns and start
with background. All functions take and return plain Python / numpy values.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from pycocotools import mask as coco_mask

RLE = dict[str, Any]


class EvaluationError(ValueError):
    """Input that cannot be scored; the message names the image, record or file and what to do."""


def encode(masks_nhw: Bool[np.ndarray, "n h w"]) -> list[RLE]:
    """Compressed RLEs of `masks_nhw` (bool or 0/1 integers), one per mask."""
    masks_nhw = np.asarray(masks_nhw)
    if masks_nhw.ndim != 3:
        raise EvaluationError(f"masks must have shape (N, H, W), got {masks_nhw.shape}")
    # One mask at a time: pycocotools wants column-major memory and a copy of the whole stack would double the peak.
    return [coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks_nhw]


def decode(rle: RLE) -> Bool[np.ndarray, "h w"]:
    """Boolean mask of one RLE."""
    return coco_mask.decode(rle).astype(bool)


def empty(size: Sequence[int]) -> RLE:
    """RLE without foreground."""
    return coco_mask.frPyObjects({"size": list(size), "counts": [int(size[0] * size[1])]}, *size)


def from_annotation(segmentation: Any, size: Sequence[int], where: str) -> RLE:
    """Compressed RLE of a COCO `segmentation`: polygons, an uncompressed or a compressed RLE.

    Args:
        segmentation: list of flat polygons (x0, y0, x1, y1, ... in pixels), or an RLE dictionary whose `counts` is a
            list, str or bytes.
        size: (height, width) of the image.
        where: prefix of error messages, e.g. ``"image 7, annotation 12"``.

    Raises:
        EvaluationError: not a segmentation, or an RLE of another size.
    """
    height, width = int(size[0]), int(size[1])
    if isinstance(segmentation, (list, tuple)):
        if not segmentation or not all(isinstance(p, (list, tuple)) and len(p) >= 6 for p in segmentation):
            raise EvaluationError(f"{where}: a polygon needs at least three points (six numbers)")
        return coco_mask.merge(coco_mask.frPyObjects([list(p) for p in segmentation], height, width))
    if not isinstance(segmentation, Mapping) or "counts" not in segmentation or "size" not in segmentation:
        raise EvaluationError(f"{where}: segmentation is neither polygons nor an RLE with 'size' and 'counts'")
    got = [int(v) for v in segmentation["size"]]
    if got != [height, width]:
        raise EvaluationError(
            f"{where}: RLE size {got} differs from the image's (height, width) [{height}, {width}]; "
            "predict at the original resolution"
        )
    counts = segmentation["counts"]
    if isinstance(counts, (list, tuple)):
        if sum(counts) != height * width:
            raise EvaluationError(f"{where}: RLE runs sum to {sum(counts)}, the image has {height * width} pixels")
        return coco_mask.frPyObjects({"size": got, "counts": list(counts)}, height, width)
    counts = counts.encode("ascii") if isinstance(counts, str) else bytes(counts)
    total = _sum_of_runs(counts)
    if total != height * width:
        raise EvaluationError(f"{where}: corrupt RLE, runs sum to {total}, the image has {height * width} pixels")
    return {"size": got, "counts": counts}


def _sum_of_runs(counts: bytes) -> int:
    """Number of pixels that a compressed RLE describes (LEB128-like groups of 5 bits, runs coded as differences)."""
    return int(run_lengths(counts).sum())


def run_lengths(counts: bytes) -> Int[np.ndarray, "r"]:
    """Run lengths (background first) of compressed `counts`."""
    groups = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    if not groups.size:
        return groups
    last = (groups & 32) == 0
    starts = np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])
    position = np.arange(groups.size) - np.repeat(starts, np.diff(np.append(starts, groups.size)))
    values = np.add.reduceat((groups & 31) << (5 * position), starts)
    ends = np.flatnonzero(last)
    if ends.size != starts.size:
        return np.array([-1])  # truncated in the middle of a number
    values -= np.where(groups[ends] & 16, 1 << (5 * (position[ends] + 1)), 0)  # sign extension
    # From the third run on, a value is the difference to the run two places before.
    runs = values.copy()
    runs[1::2] = np.cumsum(values[1::2])
    runs[2::2] = np.cumsum(values[2::2])
    return runs


def areas(rles: Sequence[RLE]) -> Float[np.ndarray, "n"]:
    """Foreground pixels of every mask."""
    return np.asarray(coco_mask.area(list(rles)), np.float64) if len(rles) else np.zeros(0)


def union(rles: Sequence[RLE]) -> RLE:
    """Mask of all foreground together."""
    return coco_mask.merge(list(rles), intersect=False)


def boxes(rles: Sequence[RLE]) -> Float[np.ndarray, "n 4"]:
    """Tight boxes (x, y, width, height) in pixels; zeros for an empty mask."""
    return np.asarray(coco_mask.toBbox(list(rles)), np.float64) if len(rles) else np.zeros((0, 4))


def iou(
    pred: Sequence[RLE], target: Sequence[RLE], crowd: Bool[np.ndarray, "g"] | None = None
) -> Float[np.ndarray, "d g"]:
    """Mask IoU of every pair; a crowd target gives intersection over the prediction's own area."""
    if not len(pred) or not len(target):
        return np.zeros((len(pred), len(target)))
    crowd = np.zeros(len(target), bool) if crowd is None else crowd
    return np.asarray(coco_mask.iou(list(pred), list(target), [int(c) for c in crowd]), np.float64)


def box_iou(
    pred_xywh: Float[np.ndarray, "d 4"],
    target_xywh: Float[np.ndarray, "g 4"],
    crowd: Bool[np.ndarray, "g"] | None = None,
) -> Float[np.ndarray, "d g"]:
    """Box IoU of every pair, boxes as (x, y, width, height) in pixels, arithmetic of `pycocotools`."""
    if not len(pred_xywh) or not len(target_xywh):
        return np.zeros((len(pred_xywh), len(target_xywh)))
    crowd = np.zeros(len(target_xywh), bool) if crowd is None else crowd
    return np.asarray(
        coco_mask.iou(np.asarray(pred_xywh, np.float64), np.asarray(target_xywh, np.float64), [int(c) for c in crowd]),
        np.float64,
    )


def intersections(pred: Sequence[RLE], target: Sequence[RLE]) -> Int[np.ndarray, "d g"]:
    """Shared pixels of every pair, exact: recovered from the IoU and the two areas."""
    ratio = iou(pred, target)
    total = areas(pred)[:, None] + areas(target)[None, :]
    return np.rint(ratio * total / (1 + ratio)).astype(np.int64)
