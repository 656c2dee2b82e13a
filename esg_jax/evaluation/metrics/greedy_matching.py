"""Greedy matching of scored predictions to ground truth, and precision / recall from the matches.

The arithmetic of `COCOeval` (pycocotools), which LVIS and YouTube-VIS share; what differs between them (overlap, area
limits, what is ignored) comes in as arrays. Matches of an image are a few booleans per prediction, so a data set can be
scored as a stream and partial results of several hosts can be joined exactly.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101)


@dataclasses.dataclass(frozen=True)
class Matches:
    """Outcome for one (image, category). A area ranges, T IoU thresholds, D predictions by falling score."""

    scores: np.ndarray  # float64 (D,)
    matched: np.ndarray  # bool (A, T, D)
    ignored: np.ndarray  # bool (A, T, D): neither right nor wrong
    num_targets: np.ndarray  # int64 (A,): ground truths that count
    positions: np.ndarray  # int64 (D,): place in the input, the last tie-break of a cut over the whole data set


def match(
    iou_dg: Float[np.ndarray, "d g"],
    scores: Float[np.ndarray, "d"],
    areas: Float[np.ndarray, "d"],
    target_areas: Float[np.ndarray, "g"],
    target_ignored: Bool[np.ndarray, "g"],
    target_crowd: Bool[np.ndarray, "g"],
    area_ranges: Float[np.ndarray, "a 2"],
    *,
    ignore_unmatched: bool = False,
    thresholds: Float[np.ndarray, "t"] = IOU_THRESHOLDS,
    positions: Int[np.ndarray, "d"] | None = None,
) -> Matches:
    """Matches of one image and category.

    Args:
        iou_dg: overlaps, rows already ordered by falling score.
        scores: the ordered scores.
        areas, target_areas: pixels, compared with `area_ranges` (inclusive limits).
        target_ignored: ground truths that never count.
        target_crowd: ground truths that may be matched repeatedly.
        ignore_unmatched: unmatched predictions are not counted as wrong (LVIS: class not exhaustively annotated).
        thresholds: IoU needed for a match.
        positions: see `Matches`.
    """
    num_preds, num_targets = iou_dg.shape
    low, high = area_ranges[:, :1], area_ranges[:, 1:]
    ignored_ag = target_ignored | (target_areas < low) | (target_areas > high)
    limits = np.minimum(thresholds, 1 - 1e-10)
    shape = (len(area_ranges), len(limits), num_preds)
    matched, ignored = np.zeros(shape, bool), np.zeros(shape, bool)
    free_atg = np.ones((*shape[:2], num_targets), bool)
    candidates = iou_dg >= limits.min()
    for d in np.flatnonzero(candidates.any(1)):
        targets = np.flatnonzero(candidates[d])
        overlap = iou_dg[d, targets]
        ok = (free_atg[:, :, targets] | target_crowd[targets]) & (overlap >= limits[:, None])
        # A ground truth that counts is preferred to any ignored one, however large the overlap with the latter.
        counts = ok & ~ignored_ag[:, None, targets]
        ok = np.where(counts.any(-1, keepdims=True), counts, ok)
        # The last of equal overlaps wins: search from the back.
        best = len(targets) - 1 - np.argmax(np.where(ok, overlap, -1.0)[..., ::-1], axis=-1)
        a, t = np.nonzero(ok.any(-1))
        chosen = targets[best[a, t]]
        matched[a, t, d] = True
        ignored[a, t, d] = ignored_ag[a, chosen]
        free_atg[a, t, chosen] = False
    outside = (areas < low) | (areas > high) | ignore_unmatched
    ignored |= ~matched & outside[:, None, :]
    return Matches(
        scores=np.asarray(scores, np.float64),
        matched=matched,
        ignored=ignored,
        num_targets=(~ignored_ag).sum(1),
        positions=np.arange(num_preds) if positions is None else positions,
    )


@dataclasses.dataclass(frozen=True)
class Curve:
    """Precision at the recall thresholds, and final recall, of one category: (A, T, R), (A, T); -1 = no target."""

    precision: np.ndarray
    recall: np.ndarray


def curve(
    images: Sequence[Matches], max_dets: int | None, *, top: int | None = None, num_areas: int | None = None
) -> Curve:
    """Precision / recall of one category over `images`, which must be ordered by image id.

    Args:
        images: matches per image.
        max_dets: best predictions per image that count; None = all.
        top: best predictions of the whole data set that count; None = all.
        num_areas: evaluate only the first area ranges.
    """
    num_areas = len(images[0].num_targets) if num_areas is None else num_areas
    scores = np.concatenate([m.scores[:max_dets] for m in images])
    matched = np.concatenate([m.matched[:num_areas, :, :max_dets] for m in images], axis=-1)
    ignored = np.concatenate([m.ignored[:num_areas, :, :max_dets] for m in images], axis=-1)
    order = np.argsort(-scores, kind="mergesort")
    if top is not None and len(order) > top:
        positions = np.concatenate([m.positions[:max_dets] for m in images])
        kept = np.zeros(len(order), bool)
        kept[np.lexsort((positions, -scores))[:top]] = True
        order = order[kept[order]]
    matched, ignored = matched[..., order], ignored[..., order]
    true = np.cumsum(matched & ~ignored, axis=-1, dtype=np.float64)
    false = np.cumsum(~matched & ~ignored, axis=-1, dtype=np.float64)
    targets = np.sum([m.num_targets[:num_areas] for m in images], axis=0)
    shape = true.shape[:2]
    precision = np.full((*shape, len(RECALL_THRESHOLDS)), -1.0)
    recall = np.full(shape, -1.0)
    for a in np.flatnonzero(targets):
        precision[a] = 0
        recall[a] = true[a, :, -1] / targets[a] if len(order) else 0
        rates = true[a] / targets[a]
        precise = true[a] / (false[a] + true[a] + np.spacing(1))
        precise = np.maximum.accumulate(precise[:, ::-1], axis=1)[:, ::-1]
        for t in range(shape[1]):
            place = np.searchsorted(rates[t], RECALL_THRESHOLDS, side="left")
            inside = place < len(order)
            precision[a, t, inside] = precise[t, place[inside]]
    return Curve(precision, recall)


def average_precisions(precision_catr: np.ndarray) -> dict[str, float]:
    """AP, AP50, AP75 and APs/m/l of precision per category, area range, IoU and recall."""
    out = {f"AP{name}": mean_valid(precision_catr[:, 0, t]) for name, t in (("", slice(None)), ("50", 0), ("75", 5))}
    return out | {f"AP{name}": mean_valid(precision_catr[:, i]) for i, name in enumerate("sml", start=1)}


def nothing_predicted(result: Any) -> Any:
    """A metric's result with NaN for every number, as the reference evaluators report it; warns."""
    warnings.warn("no predictions at all: every AP and AR is NaN", stacklevel=3)

    def undefined(value):
        if isinstance(value, dict):
            return {key: undefined(item) for key, item in value.items()}
        return [undefined(item) for item in value] if isinstance(value, list) else float("nan")

    return undefined(result)


def mean_valid(values: np.ndarray) -> float:
    """Mean of the entries above -1; -1 when there is none (no ground truth in the bucket)."""
    values = np.asarray(values)
    values = values[values > -1]
    return float(np.mean(values)) if values.size else -1.0
