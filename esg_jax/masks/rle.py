"""COCO run-length masks: encoding, decoding, and checks that `pycocotools` leaves out.

An RLE is the official dictionary ``{"size": [height, width], "counts": bytes}``; runs go down the columns and start
with background. In JSON files `counts` is text: see `to_json`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Int64, Integer
from pycocotools import mask as coco_mask

RLE = dict[str, Any]
Runs = Int64[np.ndarray, "runs"]


class MaskError(ValueError):
    """A mask that cannot be read; the message names the file or record and what is wrong."""


def encode(masks_nhw: Bool[np.ndarray, "n h w"]) -> list[RLE]:
    """Compressed RLEs of `masks_nhw` (bool or 0/1 integers), one per mask."""
    masks_nhw = np.asarray(masks_nhw)
    if masks_nhw.ndim != 3:
        raise MaskError(f"masks must have shape (N, H, W), got {masks_nhw.shape}")
    # One mask at a time: pycocotools wants column-major memory and a copy of the whole stack would double the peak.
    return [coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks_nhw]


def encode_labels(label_map: Integer[np.ndarray, "h w"], count: int) -> list[RLE]:
    """Compressed RLEs of the labels 1..count of a label map, in one pass over the pixels; other values are ignored."""
    size, flat = label_map.shape, np.asarray(label_map).ravel(order="F")
    starts = np.flatnonzero(np.diff(flat, prepend=flat[0] + 1 if flat.size else 0))
    ends, owners = np.append(starts[1:], flat.size), flat[starts]
    by_owner = np.argsort(owners, kind="stable")
    bounds = np.searchsorted(owners[by_owner], np.arange(1, count + 2))
    out = []
    for row in range(count):
        mine = by_owner[bounds[row] : bounds[row + 1]]
        edges = np.stack([starts[mine], ends[mine]], axis=1).ravel()
        tail = [flat.size] if edges.size == 0 or edges[-1] < flat.size else []
        out.append(from_runs(np.diff(np.concatenate([[0], edges, tail]).astype(np.int64)), size))
    return out


def decode(rle: Mapping[str, Any]) -> Bool[np.ndarray, "h w"]:
    """Boolean mask of one RLE."""
    return coco_mask.decode(rle).astype(bool)


def empty(size: Sequence[int]) -> RLE:
    """RLE without foreground."""
    return from_runs(np.array([size[0] * size[1]]), size)


def to_json(rle: Mapping[str, Any]) -> dict[str, Any]:
    """The RLE with text counts and plain integers, as JSON files hold it."""
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def from_annotation(segmentation: Any, size: Sequence[int], where: str = "segmentation") -> RLE:
    """Compressed RLE of a COCO `segmentation`: polygons, an uncompressed or a compressed RLE.

    Args:
        segmentation: list of flat polygons (x0, y0, x1, y1, ... in pixels), or an RLE dictionary whose `counts` is a
            list, str or bytes.
        size: (height, width) of the image.
        where: prefix of error messages, e.g. ``"image 7, annotation 12"``.

    Raises:
        MaskError: not a segmentation, an RLE of another size, or runs that do not fill the image.
    """
    if isinstance(segmentation, (list, tuple)):
        if not segmentation or not all(isinstance(p, (list, tuple)) and len(p) >= 6 for p in segmentation):
            raise MaskError(f"{where}: a polygon needs at least three points (six numbers)")
        height, width = int(size[0]), int(size[1])
        return coco_mask.merge(coco_mask.frPyObjects([list(p) for p in segmentation], height, width))
    runs = _checked_runs(segmentation, size, where)
    counts = segmentation["counts"]
    if not isinstance(counts, (str, bytes)):
        return from_runs(runs, size)
    counts = counts.encode("ascii") if isinstance(counts, str) else counts
    return {"size": [int(side) for side in size], "counts": counts}


def runs_of(segmentation: Any, size: Sequence[int], where: str = "segmentation") -> Runs:
    """Run lengths of a COCO `segmentation`; polygons of fewer than three points are no part of the mask.

    Raises:
        MaskError: as `from_annotation`.
    """
    if not isinstance(segmentation, (list, tuple)):
        return _checked_runs(segmentation, size, where)
    polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
    if not polygons:
        return np.array([size[0] * size[1]], np.int64)
    return run_lengths(from_annotation(polygons, size, where)["counts"], where)


def _checked_runs(segmentation: Any, size: Sequence[int], where: str) -> Runs:
    if not isinstance(segmentation, Mapping):
        kind = type(segmentation).__name__
        raise MaskError(f"{where} is a {kind}, expected an RLE or a list of polygons")
    if "counts" not in segmentation or "size" not in segmentation:
        raise MaskError(f"{where}: an RLE needs the keys 'size' and 'counts'")
    got, (height, width) = [int(side) for side in segmentation["size"]], size
    if got != [height, width]:
        raise MaskError(
            f"{where}: RLE size {got} differs from the image's (height, width) [{height}, {width}]; "
            "masks must have the original resolution"
        )
    counts = segmentation["counts"]
    runs = run_lengths(counts, where) if isinstance(counts, (str, bytes)) else np.asarray(counts, np.int64)
    if (runs.size and runs.min() < 0) or runs.sum() != height * width:
        raise MaskError(f"{where}: RLE runs fill {runs.sum()} pixels, the image has {height * width}")
    return runs


def run_lengths(counts: bytes | str, where: str = "segmentation") -> Runs:
    """Run lengths (background first) of compressed `counts`.

    Each number is written in groups of five bits, least significant first, one character (offset 48) per group, bit 5
    set when another group follows, bit 4 of the last group being the sign. From the fourth on, numbers are differences
    to the number two places before.

    Raises:
        MaskError: the counts are cut off in the middle of a number, or hold a character that no encoder writes.
    """
    data = counts.encode("ascii", "replace") if isinstance(counts, str) else bytes(counts)
    groups = np.frombuffer(data, np.uint8).astype(np.int64) - 48
    if groups.size == 0:
        return groups
    if groups.min() < 0 or groups.max() > 63:
        raise MaskError(f"{where}: RLE counts hold a character outside the COCO alphabet")
    last = (groups & 0x20) == 0
    if not last[-1]:
        raise MaskError(f"{where}: RLE counts are cut off in the middle of a number")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    place = np.arange(groups.size) - np.repeat(starts, lengths)
    runs = np.add.reduceat((groups & 0x1F) << (5 * place), starts)
    runs -= np.where(groups[ends] & 0x10, np.int64(1) << (5 * lengths), 0)  # sign extension
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def runs_of_mask(mask_hw: Bool[np.ndarray, "h w"]) -> Runs:
    """Run lengths of a binary mask."""
    flat = np.asarray(mask_hw, bool).ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]]))
    return np.concatenate([[0], runs]) if flat.size and flat[0] else runs


def from_runs(runs: Integer[np.ndarray, "runs"], size: Sequence[int]) -> RLE:
    """Compressed RLE of run lengths that fill an image of (height, width) `size`."""
    height, width = (int(side) for side in size)
    return coco_mask.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)


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
    boxes = (np.asarray(boxes_n4, np.float64).reshape(-1, 4) for boxes_n4 in (pred_xywh, target_xywh))
    return iou(*boxes, crowd)


def intersections(pred: Sequence[RLE], target: Sequence[RLE]) -> Int[np.ndarray, "d g"]:
    """Shared pixels of every pair, exact: recovered from the IoU and the two areas."""
    ratio = iou(pred, target)
    total = areas(pred)[:, None] + areas(target)[None, :]
    return np.rint(ratio * total / (1 + ratio)).astype(np.int64)
