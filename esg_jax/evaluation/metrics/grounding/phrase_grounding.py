"""Panoptic narrative grounding: average recall of the masks that phrases mean."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from esg_jax.evaluation.metrics.accumulator import Accumulator
from esg_jax.evaluation.metrics.paired_masks import pair_of
from esg_jax.masks import rle
from esg_jax.masks.rle import RLE

_STEPS = 100_000  # of the threshold in the AR curve: 1e-5


class PhraseGrounding(Accumulator):
    """Average recall of panoptic narrative grounding (Gonzalez et al., ICCV 2021; `BCV-Uniandes/PNG`).

    AR is the area under "share of phrases with IoU >= t" between t = 0 and 0.99999 in steps of 1e-5, so in effect the
    mean IoU over all phrases of the set; also for singular / plural phrases, things / stuff.

    Args:
        soft: the 2021 protocol: both masks shrunk to 256x256 and enlarged again bilinearly (no antialiasing), IoU of
            grey values. Default: hard masks at full resolution.
    """

    def __init__(self, *, soft: bool = False) -> None:
        super().__init__()
        self.soft = soft

    def add(self, image_id: Any, phrases: Sequence[Mapping[str, Any]]) -> None:
        """Scores the phrases of one narrative.

        Args:
            image_id: unique, sortable id of the narrative.
            phrases: each with `pred` and `gt` (RLE, or bool (H, W); plural: union of the instances), `plural` and
                `isthing` (bool). A phrase without prediction has an empty mask.
        """
        overlaps, plural, thing = [], [], []
        for i, phrase in enumerate(phrases):
            pred, target = pair_of(phrase, f"image {image_id}, phrase {i}")
            overlaps.append(_soft_iou(pred, target) if self.soft else _hard_iou(pred, target))
            plural.append(bool(phrase.get("plural", False)))
            thing.append(bool(phrase.get("isthing", True)))
        self._store(image_id, (np.array(overlaps, np.float32), np.array(plural, bool), np.array(thing, bool)))

    def result(self) -> dict[str, Any]:
        """AR, AR_Th, AR_St, AR_Sing, AR_Pl, `mean_iou`, `acc@0.5`, `num_phrases`, and `iou_per_phrase`."""
        records = self._ordered()
        if not records:
            return {name: float("nan") for name in ("AR", "AR_Th", "AR_St", "AR_Sing", "AR_Pl", "mean_iou", "acc@0.5")}
        overlap, plural, thing = (np.concatenate(column) for column in zip(*records, strict=True))
        groups = {"AR": slice(None), "AR_Th": thing, "AR_St": ~thing, "AR_Sing": ~plural, "AR_Pl": plural}
        out: dict[str, Any] = {name: average_recall(overlap[group]) for name, group in groups.items()}
        out["mean_iou"] = float(overlap.mean()) if overlap.size else float("nan")
        out["acc@0.5"] = float((overlap >= 0.5).mean()) if overlap.size else float("nan")
        out["num_phrases"] = int(overlap.size)
        out["iou_per_phrase"] = overlap.tolist()
        return out

    def draw(self):
        """Recall over the IoU threshold, for `--curves`."""
        overlap = np.concatenate([record[0] for record in self._ordered()])
        grid = np.linspace(0, 1, 501)

        def draw(axes):
            axes.plot(grid, (overlap[:, None] >= grid).mean(0))
            axes.set(xlim=(0, 1), ylim=(0, 1.02))

        return [("phrase_recall.png", draw, "IoU threshold", "recall of phrases")]


def average_recall(overlaps: Float[np.ndarray, "n"]) -> float:
    """Left Riemann sum of the recall curve over 1e5 thresholds; NaN for no phrases."""
    if not overlaps.size:
        return float("nan")
    # The official comparison is in float32. Sorted overlaps: a binary search per threshold instead of a pass.
    thresholds = (np.arange(_STEPS - 1) / _STEPS).astype(np.float32)  # 1e5 thresholds have 99999 steps between them
    below = np.searchsorted(np.sort(overlaps.astype(np.float32)), thresholds, side="left")
    return float((1 - below / overlaps.size).sum() / _STEPS)


def _hard_iou(pred: RLE, target: RLE) -> float:
    areas = rle.areas([pred, target])
    return float(rle.iou([pred], [target])[0, 0]) if areas.any() else 0.0  # empty against empty is a miss


def _soft_iou(pred: RLE, target: RLE) -> float:
    size = pred["size"]
    rows, columns = (_shrink_enlarge(n) for n in size)
    a, b = (rows @ rle.decode(m).astype(np.float32) @ columns.T for m in (pred, target))
    shared = float((a * b).sum(dtype=np.float64))
    union = float((a + b - a * b).sum(dtype=np.float64))
    return shared / union if union else 0.0


def _shrink_enlarge(length: int) -> Float[np.ndarray, "n n"]:
    """Matrix of bilinear resampling to 256 samples and back, pixel centres aligned at half pixels."""
    return _resample(256, length) @ _resample(length, 256)


def _resample(source: int, target: int) -> Float[np.ndarray, "t s"]:
    place = np.clip((np.arange(target) + 0.5) * (source / target) - 0.5, 0, None)
    low = np.minimum(place.astype(int), source - 1)
    high = np.minimum(low + 1, source - 1)
    weight = (place - low).astype(np.float32)
    out = np.zeros((target, source), np.float32)
    out[np.arange(target), low] += 1 - weight
    out[np.arange(target), high] += weight
    return out
