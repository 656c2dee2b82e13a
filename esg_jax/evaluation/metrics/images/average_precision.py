"""AP^e (entity AP, class-agnostic), COCO mask / box AP, boundary AP, and the AR family.

Sources: `COCOeval` of pycocotools; ESG section 4 and the CropFormer repository, whose evaluator folds all categories
into one and drops boxes (the only difference between AP^e and mask AP); Cheng et al. 2021 for boundary AP.
"""

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from esg_jax.evaluation.metrics.accumulator import Accumulator
from esg_jax.evaluation.metrics.boundary import boundary_iou
from esg_jax.evaluation.metrics.errors import EvaluationError
from esg_jax.evaluation.metrics.greedy_matching import (
    IOU_THRESHOLDS,
    Curve,
    Matches,
    average_precisions,
    curve,
    match,
    mean_valid,
    nothing_predicted,
)
from esg_jax.evaluation.metrics.instances import Instances, as_instances
from esg_jax.masks import rle

# All, small, medium, large: squares of 32 and 96 pixels, limits of the annotated area in original pixels.
AREA_RANGES = ((0.0, 1e10), (0.0, 32.0**2), (32.0**2, 96.0**2), (96.0**2, 1e10))

Kind = Literal["segm", "bbox", "boundary"]


class AveragePrecision(Accumulator):
    """COCO average precision and recall, streamed.

    Args:
        kind: overlap of masks, boxes, or min(mask, boundary) overlap.
        class_agnostic: treat every label as the same class (AP^e, in-the-wild recall).
        categories: class ids that count; None = those seen in the ground truth. Predictions of other classes are
            left out, as pycocotools does.
        max_dets: predictions per image (and class) for AR; AP uses the last.
        box_areas: sort predictions into the size buckets by their box although masks are scored, which pycocotools
            does when a results file keeps `bbox`; published numbers of detectron2 do not.
        dilation: boundary width as a fraction of the image diagonal (kind "boundary").
    """

    def __init__(
        self,
        kind: Kind = "segm",
        *,
        class_agnostic: bool = False,
        categories: Sequence[int] | None = None,
        max_dets: Sequence[int] = (1, 10, 100),
        box_areas: bool = False,
        dilation: float = 0.02,
    ) -> None:
        super().__init__()
        if kind not in ("segm", "bbox", "boundary"):
            raise EvaluationError(f"kind is {kind!r}; choose segm, bbox or boundary")
        self.kind = kind
        self.class_agnostic = class_agnostic
        self.categories = None if categories is None or class_agnostic else tuple(sorted(set(categories)))
        self.max_dets = tuple(sorted(max_dets))
        self.box_areas = box_areas
        self.dilation = dilation

    def add(self, image_id: Any, prediction: Any, ground_truth: Any, size: Sequence[int] | None = None) -> None:
        """Scores one image.

        Args:
            image_id: sortable id, unique over the set.
            prediction, ground_truth: see `as_instances`; either may be empty.
            size: (height, width) of the image; masks of another size are refused.
        """
        pred = as_instances(prediction, image_id=image_id, size=size)
        target = as_instances(ground_truth, image_id=image_id, size=size)
        self._check(image_id, pred, target)
        pred_labels = np.zeros(len(pred), np.int64) if self.class_agnostic else pred.labels
        target_labels = np.zeros(len(target), np.int64) if self.class_agnostic else target.labels
        record = {}
        for label in np.union1d(pred_labels, target_labels):
            record[int(label)] = self._match(
                pred.select(np.flatnonzero(pred_labels == label)),
                target.select(np.flatnonzero(target_labels == label)),
            )
        self._store(image_id, record)

    def _check(self, image_id: Any, pred: Instances, target: Instances) -> None:
        name = "bbox" if self.kind == "bbox" else "segmentation"
        for role, instances in (("prediction", pred), ("ground truth", target)):
            if len(instances) and (instances.boxes if self.kind == "bbox" else instances.rles) is None:
                raise EvaluationError(f"image {image_id}: the {role} has no {name!r}, which {self.kind} AP scores")
        if self.kind != "bbox" and len(pred) and len(target) and pred.rles[0]["size"] != target.rles[0]["size"]:
            raise EvaluationError(
                f"image {image_id}: predicted masks are {pred.rles[0]['size']} (height, width), "
                f"annotated ones {target.rles[0]['size']}; predict at the original resolution"
            )

    def _match(self, pred: Instances, target: Instances) -> Matches:
        order = np.argsort(-pred.scores, kind="mergesort")[: self.max_dets[-1]]
        pred = pred.select(order)
        if self.kind == "bbox":
            overlap = rle.box_iou(pred.boxes, target.boxes, target.crowd) if len(pred) and len(target) else None
        else:
            overlap = rle.iou(pred.rles or [], target.rles or [], target.crowd)
            if self.kind == "boundary":
                overlap = boundary_iou(
                    pred.rles or [], target.rles or [], target.crowd, overlap, self.dilation, IOU_THRESHOLDS[0]
                )
        if overlap is None:
            overlap = np.zeros((len(pred), len(target)))
        of_boxes = self.kind == "bbox" or (self.box_areas and pred.boxes is not None)
        return match(
            overlap,
            pred.scores,
            pred.pixel_areas(of_boxes=of_boxes) if len(pred) else np.zeros(0),
            target.pixel_areas(of_boxes=self.kind == "bbox") if len(target) else np.zeros(0),
            target.crowd,
            target.crowd,
            np.asarray(AREA_RANGES),
            positions=order,
        )

    def num_predictions(self) -> int:
        """Predictions stored so far."""
        return sum(len(m.scores) for record in self._records.values() for m in record.values())

    def _by_category(self) -> dict[int, list[Matches]]:
        images = self._ordered()
        categories = self.categories
        if categories is None:
            seen = {c for image in images for c, m in image.items() if m.num_targets[0]}
            categories = [0] if self.class_agnostic else sorted(seen)
        predicted = {c for image in images for c in image}
        if predicted - set(categories):
            strange = sorted(predicted - set(categories))
            warnings.warn(f"predictions of classes {strange[:5]} are left out: not among the categories", stacklevel=3)
        return {c: [image[c] for image in images if c in image] for c in categories}

    def curves(self) -> dict[int, Curve]:
        """Precision / recall at the largest number of predictions, per category id (0 when class-agnostic)."""
        return {
            c: curve(images, self.max_dets[-1]) if images else _no_curve() for c, images in self._by_category().items()
        }

    def result(self) -> dict[str, Any]:
        """AP, AP50, AP75, APs/m/l, AR at every `max_dets`, ARs/m/l, recall at IoU 0.5, and per-IoU / per-class lists.

        -1 marks a bucket without ground truth (as pycocotools does); everything is NaN when nothing was predicted at
        all, which the reference evaluator reports too.
        """
        curves = self.curves()
        precision = np.array([c.precision for c in curves.values()]).reshape(-1, 4, 10, 101)
        recall = np.array([c.recall for c in curves.values()]).reshape(-1, 4, 10)
        best = self.max_dets[-1]
        out: dict[str, Any] = average_precisions(precision)
        for count in self.max_dets[:-1]:
            few = [curve(m, count, num_areas=1).recall for m in self._by_category().values() if m]
            out[f"AR{count}"] = mean_valid(np.array(few))
        out[f"AR{best}"] = mean_valid(recall[:, 0])
        for i, name in enumerate("sml", start=1):
            out[f"AR{name}"] = mean_valid(recall[:, i])
        out[f"AR@{best}@IoU0.5"] = mean_valid(recall[:, 0, 0])
        out["AP_per_iou"] = [mean_valid(precision[:, 0, t]) for t in range(10)]
        out[f"AR{best}_per_iou"] = [mean_valid(recall[:, 0, t]) for t in range(10)]
        out["AP_per_category"] = {c: mean_valid(precision[k, 0]) for k, c in enumerate(curves)}
        return out if self.num_predictions() else nothing_predicted(out)


class EntityAP(AveragePrecision):
    """AP^e: class-agnostic mask AP of the entity papers, its size buckets and recalls.

    The reference evaluator makes every category 1 and drops the predictions' boxes; there is no suppression and no
    overlap rule (models make their output non-overlapping themselves).
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("segm", class_agnostic=True, **kwargs)


def _no_curve() -> Curve:
    return Curve(np.full((4, 10, 101), -1.0), np.full((4, 10), -1.0))
