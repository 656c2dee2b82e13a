"""Metrics of both papers, equal to the official evaluators; see docs/evaluation.md for the list.

Numpy in, numbers out: every metric is an object with `add(...)` per image, `merge(other)` and `result()`.
"""

from esg_jax.evaluation.average_precision import AveragePrecision, EntityAP
from esg_jax.evaluation.best_overlap import BestOverlap
from esg_jax.evaluation.instances import Instances, as_instances
from esg_jax.evaluation.panoptic import PanopticQuality
from esg_jax.evaluation.rle import EvaluationError
from esg_jax.evaluation.semantic import SemanticIoU

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
