"""1-click interactive segmentation (Semantic-SAM, GLEE supplement Table 7)."""

from typing import Any

import numpy as np
from jaxtyping import Bool
from scipy import ndimage

from esg_jax.evaluation.metrics.accumulator import Accumulator
from esg_jax.evaluation.metrics.errors import EvaluationError
from esg_jax.evaluation.metrics.paired_masks import pair_of
from esg_jax.masks import rle


class ClickIoU(Accumulator):
    """Mean over ground-truth instances of the IoU of the mask predicted from one click.

    The mask must be the one the model's own confidence chooses; picking by IoU is an oracle, not this metric. Where the
    click lies changes the number: use `click_point`.
    """

    unit = "instance"

    def add(self, instance_id: Any, prediction: Any, ground_truth: Any) -> None:
        """Scores one instance; masks as RLE or bool (H, W)."""
        where = f"instance {instance_id}"
        pred, target = pair_of({"pred": prediction, "gt": ground_truth}, where)
        if not rle.areas([target])[0]:
            raise EvaluationError(f"{where}: the ground-truth mask is empty, nothing could have been clicked")
        self._store(instance_id, float(rle.iou([pred], [target])[0, 0]))

    def result(self) -> dict[str, Any]:
        """`mIoU_1click`, `num_instances`, `iou_per_instance`."""
        overlaps = self._ordered()
        return {
            "mIoU_1click": float(np.mean(overlaps)) if overlaps else float("nan"),
            "num_instances": len(overlaps),
            "iou_per_instance": overlaps,
        }


def click_point(mask: Bool[np.ndarray, "h w"]) -> tuple[int, int]:
    """(x, y) of the click: the pixel farthest from the outside of `mask` (first in row order of equals).

    Raises:
        EvaluationError: an empty mask.
    """
    mask = np.asarray(mask, bool)
    if not mask.any():
        raise EvaluationError("an empty mask has no point to click")
    inner = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]  # beyond the image is outside too
    y, x = np.unravel_index(int(np.argmax(inner)), mask.shape)
    return int(x), int(y)
