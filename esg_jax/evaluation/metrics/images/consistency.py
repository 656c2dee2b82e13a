"""Agreement of annotators (ESG Table 2): class-agnostic mask mAP, and class accuracy on the same masks."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from esg_jax.evaluation.metrics.accumulator import Accumulator
from esg_jax.evaluation.metrics.images.average_precision import EntityAP
from esg_jax.evaluation.metrics.instances import as_instances
from esg_jax.masks import rle


class AnnotatorConsistency(Accumulator):
    """One annotator taken as ground truth, another as prediction.

    Annotations have no scores: all get 1, so that they count in the order of the file (the paper does not say). `ACC`
    is the share of masks drawn identically by both (the second round of the paper labels given masks) whose class
    agrees.
    """

    def __init__(self) -> None:
        super().__init__()
        self._precision = EntityAP(max_dets=(1, 10, 100))

    def _settings(self) -> dict[str, Any]:
        return {}

    def merge(self, other: "AnnotatorConsistency") -> "AnnotatorConsistency":
        super().merge(other)
        self._precision.merge(other._precision)
        return self

    def add(self, image_id: Any, prediction: Any, ground_truth: Any, size: Sequence[int] | None = None) -> None:
        """Compares the annotations of one image; arguments as in `AveragePrecision.add`."""
        pred = as_instances(prediction, image_id=image_id, size=size)
        target = as_instances(ground_truth, image_id=image_id, size=size)
        pred = dataclasses.replace(pred, scores=np.ones(len(pred)), areas=None)
        self._precision.add(image_id, pred, target, size)
        same = rle.iou(pred.rles or [], target.rles or []) == 1
        pairs = np.argwhere(same)
        agreed = sum(int(pred.labels[p] == target.labels[t]) for p, t in pairs)
        self._store(image_id, (agreed, len(pairs)))

    def result(self) -> dict[str, Any]:
        """`mAP`, `AP50`, `AP75`, `ACC` (NaN without identical masks), `num_same_masks`."""
        precision = self._precision.result()
        agreed, total = (sum(column) for column in zip(*[(0, 0), *self._ordered()], strict=True))
        return {
            "mAP": precision["AP"],
            "AP50": precision["AP50"],
            "AP75": precision["AP75"],
            "ACC": agreed / total if total else float("nan"),
            "num_same_masks": total,
        }
