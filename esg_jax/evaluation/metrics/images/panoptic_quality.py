"""Panoptic quality (Kirillov et al., CVPR 2019), equal to `panopticapi`'s `pq_compute`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from esg_jax.evaluation.metrics.accumulator import Accumulator
from esg_jax.evaluation.metrics.errors import EvaluationError

VOID = 0
_SHIFT = 32  # both segment ids (24 bits in the PNG format) in one integer


class PanopticQuality(Accumulator):
    """PQ, SQ and RQ over all classes, things and stuff.

    A pair matches when classes agree, the ground truth is no crowd and IoU > 0.5, where the union leaves out predicted
    pixels on void. Unmatched predictions that lie by more than half on void or a crowd of their class are not counted.
    Counts are summed over the set before any division.

    Args:
        categories: COCO category records (`id`, and `isthing` 0 / 1, default 1).
    """

    def __init__(self, categories: Iterable[Mapping[str, Any]]) -> None:
        super().__init__()
        self.is_thing = {int(c["id"]): bool(c.get("isthing", 1)) for c in categories}
        if not self.is_thing:
            raise EvaluationError("the ground truth lists no categories")

    def add(
        self,
        image_id: Any,
        prediction: tuple[Int[np.ndarray, "h w"], Sequence[Mapping[str, Any]]],
        ground_truth: tuple[Int[np.ndarray, "h w"], Sequence[Mapping[str, Any]]],
    ) -> None:
        """Scores one image.

        Args:
            image_id: sortable id, unique over the set.
            prediction: segment ids per pixel (0 = nothing) and their records (`id`, `category_id`).
            ground_truth: likewise, with `iscrowd` and `area` (counted when absent).

        Raises:
            EvaluationError: sizes that differ, ids in the map without record or the reverse, unknown categories.
        """
        pred_map, pred_records = prediction
        target_map, target_records = ground_truth
        if np.shape(pred_map) != np.shape(target_map):
            raise EvaluationError(
                f"image {image_id}: prediction has {np.shape(pred_map)} pixels, ground truth {np.shape(target_map)}"
            )
        shared = _overlaps(target_map, pred_map)
        preds = self._by_id(image_id, "prediction", pred_records)
        targets = self._by_id(image_id, "ground truth", target_records)
        pred_areas, target_areas = {}, {}
        for (t, p), count in shared.items():
            pred_areas[p] = pred_areas.get(p, 0) + count
            target_areas[t] = target_areas.get(t, 0) + count
        self._check_ids(image_id, set(preds), set(pred_areas) - {VOID})
        self._store(image_id, _count(shared, preds, targets, pred_areas, target_areas))

    def _by_id(self, image_id: Any, role: str, records: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
        out = {}
        for record in records:
            if record["category_id"] not in self.is_thing:
                raise EvaluationError(
                    f"image {image_id}: {role} segment {record['id']} has unknown category_id {record['category_id']}"
                )
            if record["id"] in out:
                raise EvaluationError(f"image {image_id}: {role} lists segment {record['id']} twice")
            out[int(record["id"])] = record
        return out

    @staticmethod
    def _check_ids(image_id: Any, listed: set[int], drawn: set[int]) -> None:
        if drawn - listed:
            raise EvaluationError(
                f"image {image_id}: predicted segment {min(drawn - listed)} is in the PNG but not in segments_info"
            )
        if listed - drawn:
            raise EvaluationError(
                f"image {image_id}: predicted segment {min(listed - drawn)} is in segments_info but not in the PNG"
            )

    def result(self) -> dict[str, Any]:
        """PQ, SQ, RQ (and `_Th`, `_St`), `n` classes in each mean, and `per_class`."""
        totals = {c: np.zeros(4) for c in self.is_thing}  # sum of IoU, TP, FP, FN
        for record in self._ordered():
            for category, counts in record.items():
                totals[category] += counts
        per_class = {c: _quality(t) for c, t in totals.items()}
        out: dict[str, Any] = {}
        for suffix, wanted in (("", (True, False)), ("_Th", (True,)), ("_St", (False,))):
            rows = [per_class[c] for c, t in totals.items() if self.is_thing[c] in wanted and t[1:].sum()]
            for key in ("PQ", "SQ", "RQ"):
                out[key + suffix] = float(np.mean([row[key] for row in rows])) if rows else float("nan")
            out["n" + suffix] = len(rows)
        out["per_class"] = per_class
        return out


def _overlaps(target_map: np.ndarray, pred_map: np.ndarray) -> dict[tuple[int, int], int]:
    """Pixels of every (target id, predicted id). Counts runs of equal pairs, far fewer than pixels, then sums them."""
    pairs = (np.asarray(target_map).astype(np.int64).ravel() << _SHIFT) | np.asarray(pred_map).astype(np.int64).ravel()
    starts = np.concatenate([[0], np.flatnonzero(pairs[1:] != pairs[:-1]) + 1]) if pairs.size else np.zeros(0, int)
    lengths = np.diff(np.append(starts, pairs.size))
    ids, inverse = np.unique(pairs[starts], return_inverse=True)
    counts = np.bincount(inverse, weights=lengths, minlength=len(ids)).astype(np.int64)
    mask = (1 << _SHIFT) - 1
    return {(i >> _SHIFT, i & mask): c for i, c in zip(ids.tolist(), counts.tolist(), strict=True)}


def _count(shared, preds, targets, pred_areas, target_areas) -> dict[int, np.ndarray]:
    counts: dict[int, np.ndarray] = {}

    def tally(category, index, amount=1.0):
        counts.setdefault(int(category), np.zeros(4))[index] += amount

    matched_preds, matched_targets = set(), set()
    for (t, p), inter in sorted(shared.items()):
        if t not in targets or p not in preds or targets[t].get("iscrowd", 0):
            continue
        if targets[t]["category_id"] != preds[p]["category_id"]:
            continue
        area = targets[t].get("area", target_areas[t])
        overlap = inter / (pred_areas[p] + area - inter - shared.get((VOID, p), 0))
        if overlap > 0.5:
            tally(preds[p]["category_id"], 0, overlap)
            tally(preds[p]["category_id"], 1)
            matched_preds.add(p)
            matched_targets.add(t)
    crowds = {}
    for t, record in targets.items():
        if t in matched_targets:
            continue
        if record.get("iscrowd", 0):
            crowds[record["category_id"]] = t  # the reference remembers one crowd per class: the last
        else:
            tally(record["category_id"], 3)
    for p, record in preds.items():
        if p in matched_preds:
            continue
        uncounted = shared.get((VOID, p), 0) + shared.get((crowds.get(record["category_id"]), p), 0)
        if uncounted / pred_areas[p] <= 0.5:
            tally(record["category_id"], 2)
    return counts


def _quality(total: np.ndarray) -> dict[str, float]:
    overlap, true, false, missed = total.tolist()
    if true + false + missed == 0:
        return {"PQ": 0.0, "SQ": 0.0, "RQ": 0.0}
    pairs = true + 0.5 * false + 0.5 * missed
    return {"PQ": overlap / pairs, "SQ": overlap / true if true else 0.0, "RQ": true / pairs}
