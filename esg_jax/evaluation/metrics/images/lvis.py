"""LVIS average precision (Gupta et al., CVPR 2019), equal to `lvis-api`.

LVIS annotates every image only for some classes. Predictions of a class that is neither annotated nor listed as absent
in the image are dropped; unmatched predictions of a class that is not annotated exhaustively are ignored. The official
code also drops every instance of zero area before matching, which COCO tools count as false positives.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from esg_jax.evaluation.metrics.accumulator import Accumulator
from esg_jax.evaluation.metrics.errors import EvaluationError
from esg_jax.evaluation.metrics.greedy_matching import (
    Matches,
    average_precisions,
    curve,
    match,
    mean_valid,
    nothing_predicted,
)
from esg_jax.evaluation.metrics.images.average_precision import AREA_RANGES
from esg_jax.evaluation.metrics.instances import as_instances
from esg_jax.masks import rle

FIXED_TOP = 10000


class LvisAP(Accumulator):
    """LVIS AP with rare / common / frequent classes.

    Args:
        categories: LVIS category records (`id`, `frequency` in r, c, f).
        kind: "segm" or "bbox".
        max_dets: best predictions per image over all classes; -1 = all.
        top_per_class: "AP fixed": with `max_dets=-1`, the best so many per class over the whole set (official 10000).
    """

    def __init__(
        self,
        categories: Iterable[Mapping[str, Any]],
        *,
        kind: str = "segm",
        max_dets: int = 300,
        top_per_class: int | None = None,
    ) -> None:
        super().__init__()
        self.frequency = {int(c["id"]): c.get("frequency") for c in categories}
        if kind not in ("segm", "bbox"):
            raise EvaluationError(f"kind is {kind!r}; choose segm or bbox")
        self.kind = kind
        self.max_dets = max_dets
        self.top_per_class = top_per_class

    def add(
        self,
        image_id: Any,
        prediction: Any,
        ground_truth: Any,
        size: Sequence[int] | None = None,
        *,
        negative: Sequence[int] = (),
        not_exhaustive: Sequence[int] = (),
        positions: Sequence[int] | None = None,
    ) -> None:
        """Scores one image.

        Args:
            image_id, prediction, ground_truth, size: as in `AveragePrecision.add`.
            negative: classes known to be absent.
            not_exhaustive: classes of which only some instances are annotated.
            positions: places of the predictions in the results file, which decide score ties at the
                `top_per_class` cut; default: their order within the image.
        """
        pred = as_instances(prediction, image_id=image_id, size=size)
        target = as_instances(ground_truth, image_id=image_id, size=size)
        of_boxes = self.kind == "bbox"
        order = np.argsort(-pred.scores, kind="mergesort")
        if self.max_dets >= 0:
            order = order[: self.max_dets]
        pred = pred.select(order)
        positions = order if positions is None else np.asarray(positions, np.int64)[order]
        pred_areas = pred.pixel_areas(of_boxes=of_boxes) if len(pred) else np.zeros(0)
        target_areas = target.pixel_areas(of_boxes=of_boxes) if len(target) else np.zeros(0)
        judged = set(target.labels[target_areas > 0].tolist()) | set(negative)
        record: dict[int, Matches] = {}
        for label in sorted(judged):
            p = np.flatnonzero((pred.labels == label) & (pred_areas > 0))
            t = np.flatnonzero((target.labels == label) & (target_areas > 0))
            if not len(p) and not len(t):
                continue
            if not len(p) or not len(t):
                overlap = np.zeros((len(p), len(t)))
            elif of_boxes:
                overlap = rle.box_iou(pred.boxes[p], target.boxes[t])
            else:
                overlap = rle.iou(pred.select(p).rles, target.select(t).rles)
            none = np.zeros(len(t), bool)
            record[label] = match(
                overlap,
                pred.scores[p],
                pred_areas[p],
                target_areas[t],
                none,
                none,
                np.asarray(AREA_RANGES),
                ignore_unmatched=label in set(not_exhaustive),
                positions=positions[p],
            )
        self._store(image_id, (record, len(pred)))

    def result(self) -> dict[str, Any]:
        """AP, AP50, AP75, APs/m/l, APr/c/f, AR@max_dets (and s/m/l), AP per category; -1 for empty buckets."""
        records = self._ordered()
        images = [record for record, _ in records]
        precision, recall = {}, {}
        for label in sorted(self.frequency):
            matches = [image[label] for image in images if label in image]
            if matches:
                both = curve(matches, None, top=self.top_per_class)
                precision[label], recall[label] = both.precision, both.recall
        p = np.array(list(precision.values())).reshape(-1, 4, 10, 101)
        r = np.array(list(recall.values())).reshape(-1, 4, 10)
        labels = list(precision)
        out: dict[str, Any] = average_precisions(p)
        for name in "rcf":
            out[f"AP{name}"] = mean_valid(p[[k for k, c in enumerate(labels) if self.frequency[c] == name], 0])
        for i, name in enumerate(("", "s", "m", "l")):
            out[f"AR{name}@{self.max_dets}"] = mean_valid(r[:, i])
        out["AP_per_category"] = {c: mean_valid(precision[c][0]) for c in labels}
        return out if sum(count for _, count in records) else nothing_predicted(out)
