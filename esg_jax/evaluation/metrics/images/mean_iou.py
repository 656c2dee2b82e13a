"""Mean IoU of semantic segmentation, both of the definitions in use (detectron2 `sem_seg_evaluation`)."""

from typing import Any, Self

import numpy as np
from jaxtyping import Int
from scipy import ndimage

from esg_jax.evaluation.metrics.accumulator import Accumulator
from esg_jax.evaluation.metrics.boundary import boundary_width
from esg_jax.evaluation.metrics.errors import EvaluationError


class SemanticIoU(Accumulator):
    """Confusion matrix over the set and what follows from it.

    Args:
        num_classes: C; labels are 0..C-1.
        ignore_label: ground-truth value whose pixels are left out.
        boundary: also count label-map boundaries (2 % of the diagonal), as detectron2 does when OpenCV is present.
    """

    def __init__(self, num_classes: int, *, ignore_label: int = 255, boundary: bool = False) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.ignore_label = ignore_label
        self.boundary = boundary
        # Integer sums are exact in any order, so one matrix serves and images need no record of their own.
        self._matrices = np.zeros((2, num_classes + 1, num_classes + 1), np.int64)

    def _settings(self) -> dict[str, Any]:
        return {name: value for name, value in super()._settings().items() if name != "_matrices"}

    def merge(self, other: Self) -> Self:
        super().merge(other)
        self._matrices = self._matrices + other._matrices
        return self

    def add(self, image_id: Any, prediction: Int[np.ndarray, "h w"], ground_truth: Int[np.ndarray, "h w"]) -> None:
        """Counts one image; label maps of equal size.

        Raises:
            EvaluationError: sizes differ, or a label is out of range.
        """
        pred, target = np.asarray(prediction).astype(np.int64), np.asarray(ground_truth).astype(np.int64)
        if pred.shape != target.shape or pred.ndim != 2:
            raise EvaluationError(
                f"image {image_id}: prediction has shape {pred.shape}, ground truth {target.shape}; "
                "label maps must be (H, W) at the ground truth's resolution"
            )
        target = np.where(target == self.ignore_label, self.num_classes, target)
        limits = (("prediction", pred, self.num_classes - 1), ("ground truth", target, self.num_classes))
        for role, labels, limit in limits:
            if labels.size and (labels.min() < 0 or labels.max() > limit):
                bad = labels.min() if labels.min() < 0 else labels.max()
                raise EvaluationError(f"image {image_id}: {role} label {bad} is outside 0..{self.num_classes - 1}")
        self._store(image_id, None)
        self._matrices[0] += self._confusion(pred, target)
        if self.boundary:
            self._matrices[1] += self._confusion(_label_boundary(pred), _label_boundary(target))

    def _confusion(self, pred: np.ndarray, target: np.ndarray) -> np.ndarray:
        size = self.num_classes + 1
        return np.bincount((size * pred + target).ravel(), minlength=size * size).reshape(size, size)

    def result(self) -> dict[str, Any]:
        """`mIoU` (mean over classes with ground truth), `mIoU_with_predicted_only` (classes that are only predicted
        count as 0: detectron2 up to 0.6, GLEE), `fwIoU`, `mACC`, `pACC`, `IoU_per_class`, `ACC_per_class` (NaN for
        classes without ground truth), and with `boundary` the per-class boundary IoU and min of both.
        """
        true, target, pred = _totals(self._matrices[0])
        annotated = target > 0
        union = target + pred - true
        iou = np.divide(true, union, out=np.full(true.shape, np.nan), where=annotated & (union > 0))
        accuracy = np.divide(true, target, out=np.full(true.shape, np.nan), where=annotated)
        seen = int(annotated.sum())
        out = {
            "mIoU": _ratio(np.nansum(iou), seen),
            "mIoU_with_predicted_only": _ratio(np.nansum(iou), int((union > 0).sum())),
            "fwIoU": _ratio(np.nansum(iou * target), target.sum()),
            "mACC": _ratio(np.nansum(accuracy), seen),
            "pACC": _ratio(true.sum(), target.sum()),
            "IoU_per_class": iou.tolist(),
            "ACC_per_class": accuracy.tolist(),
        }
        if self.boundary:
            true, target, pred = _totals(self._matrices[1])
            union = target + pred - true
            edge = np.divide(true, union, out=np.full(true.shape, np.nan), where=union > 0)
            out["boundary_IoU_per_class"] = edge.tolist()
            out["min_IoU_per_class"] = np.minimum(iou, edge).tolist()
        return out


def _totals(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True positives, ground-truth and predicted pixels per class; ignored ground truth left out."""
    matrix = matrix[:-1, :-1].astype(np.float64)
    return matrix.diagonal(), matrix.sum(0), matrix.sum(1)


def _ratio(a: float, b: float) -> float:
    return float(a / b) if b else float("nan")


def _label_boundary(labels: np.ndarray) -> np.ndarray:
    """Label map minus its greyscale erosion, as the reference computes it (it treats labels as intensities)."""
    labels = labels.astype(np.uint8)
    size = 2 * boundary_width(labels.shape) + 1
    eroded = labels
    for axis in (0, 1):
        eroded = ndimage.minimum_filter1d(eroded, size, axis=axis, mode="constant", cval=0)
    return (labels - eroded).astype(np.int64)
