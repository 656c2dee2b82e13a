"""How well the ground-truth entities are covered, whatever the scores say.

For every annotated entity the best IoU over all predictions of the image; the mean of these, and the share that reaches
0.5. Predictions may serve several entities. The measure of the superpixel floor, for partitions without confidences.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from esg_jax.evaluation.metrics.accumulator import Accumulator
from esg_jax.evaluation.metrics.instances import as_instances
from esg_jax.masks import rle


class BestOverlap(Accumulator):
    """Mean best IoU and recall at IoU 0.5 of the entities of a set (micro-averaged; crowd regions left out)."""

    def add(self, image_id: Any, prediction: Any, ground_truth: Any, size: Sequence[int] | None = None) -> None:
        """Scores one image; arguments as in `AveragePrecision.add`."""
        pred = as_instances(prediction, image_id=image_id, size=size)
        target = as_instances(ground_truth, image_id=image_id, size=size)
        target = target.select(np.flatnonzero(~target.crowd))
        overlap = rle.iou(pred.rles or [], target.rles or [])
        self._store(image_id, overlap.max(0) if len(pred) else np.zeros(len(target)))

    def result(self) -> dict[str, Any]:
        """`mean_best_iou`, `recall@IoU0.5` (IoU >= 0.5), `num_entities`, `num_images`."""
        best = np.concatenate([*self._ordered(), np.zeros(0)])
        return {
            "mean_best_iou": float(best.mean()) if best.size else float("nan"),
            "recall@IoU0.5": float((best >= 0.5).mean()) if best.size else float("nan"),
            "num_entities": int(best.size),
            "num_images": len(self),
        }
