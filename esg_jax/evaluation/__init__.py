"""Metrics of both papers, equal to the official evaluators; see docs/evaluation.md for the list.

Numpy in, numbers out: every metric is an object with `add(...)` per image, `merge(other)` and `result()`.
"""

from esg_jax.evaluation.metrics.errors import EvaluationError
from esg_jax.evaluation.metrics.images.average_precision import AveragePrecision, EntityAP
from esg_jax.evaluation.metrics.images.best_overlap import BestOverlap
from esg_jax.evaluation.metrics.images.mean_iou import SemanticIoU
from esg_jax.evaluation.metrics.images.panoptic_quality import PanopticQuality
from esg_jax.evaluation.metrics.instances import Instances, as_instances

__all__ = [
    "AveragePrecision",
    "BestOverlap",
    "EntityAP",
    "EvaluationError",
    "Instances",
    "PanopticQuality",
    "SemanticIoU",
    "as_instances",
]
