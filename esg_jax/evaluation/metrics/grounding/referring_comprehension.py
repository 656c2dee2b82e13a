"""Referring comprehension: precision of the best box or mask of every expression."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from esg_jax.evaluation.metrics.accumulator import Accumulator
from esg_jax.evaluation.metrics.errors import EvaluationError
from esg_jax.evaluation.metrics.instances import as_instances
from esg_jax.masks import rle


class ReferringComprehension(Accumulator):
    """P@k, mIoU and oIoU of the top-scoring box or mask per expression, arithmetic of GLEE's evaluator.

    float32, (I + 1e-6) / (U + 1e-6), strictly greater than k.

    Args:
        kind: "bbox" or "segm".
    """

    def __init__(self, kind: str = "bbox") -> None:
        super().__init__()
        if kind not in ("segm", "bbox"):
            raise EvaluationError(f"kind is {kind!r}; choose segm or bbox")
        self.kind = kind

    def add(self, image_id: Any, prediction: Any, ground_truth: Any, size: Sequence[int] | None = None) -> None:
        """Scores one expression: candidates with scores against the one target; see `as_instances`.

        Raises:
            EvaluationError: no prediction (the reference fails too, rather than counting 0), or not one target.
        """
        pred = as_instances(prediction, image_id=image_id, size=size)
        target = as_instances(ground_truth, image_id=image_id, size=size)
        if len(target) != 1:
            raise EvaluationError(f"image {image_id}: an expression needs exactly one target, got {len(target)}")
        if not len(pred):
            raise EvaluationError(f"image {image_id}: no prediction; every expression needs one")
        best = pred.select(np.array([int(np.argmax(pred.scores))]))
        if self.kind == "bbox":
            if best.boxes is None or target.boxes is None:
                raise EvaluationError(f"image {image_id}: 'bbox' is missing")
            shared, union = _box_overlap(best.boxes[0], target.boxes[0])
        else:
            if best.rles is None or target.rles is None:
                raise EvaluationError(f"image {image_id}: 'segmentation' is missing")
            inter = int(rle.intersections(best.rles, target.rles)[0, 0])
            union = np.float32(rle.areas(best.rles)[0] + rle.areas(target.rles)[0] - inter)
            shared = np.float32(inter)
        self._store(image_id, (shared, union))

    def result(self) -> dict[str, Any]:
        """`P@0.5` ... `P@0.9`, `mIoU`, `oIoU`, `num_expressions`, `iou_per_expression`."""
        pairs = np.array(self._ordered(), np.float32).reshape(-1, 2)
        small = np.float32(1e-6)
        overlap = (pairs[:, 0] + small) / (pairs[:, 1] + small)
        nan = float("nan")
        out: dict[str, Any] = {
            f"P@{k / 10}": float((overlap > np.float32(k / 10)).mean()) if len(pairs) else nan for k in range(5, 10)
        }
        total = pairs.astype(np.float64).sum(0)
        out["mIoU"] = float(overlap.mean(dtype=np.float64)) if len(pairs) else nan
        out["oIoU"] = float(total[0] / total[1]) if len(pairs) else nan
        out["num_expressions"] = len(pairs)
        out["iou_per_expression"] = overlap.tolist()
        return out


def _box_overlap(a_xywh: np.ndarray, b_xywh: np.ndarray) -> tuple[np.float32, np.float32]:
    """Intersection and union in float32 from corner form, where the reference rounds."""
    a, b = (np.concatenate([box[:2], box[:2] + box[2:]]).astype(np.float32) for box in (a_xywh, b_xywh))
    sides = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None)
    shared = sides[0] * sides[1]
    return shared, (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
