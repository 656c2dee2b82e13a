"""Masks and boxes named by text: panoptic narrative grounding, referring and reasoning segmentation, REC."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from esg_jax.evaluation import rle
from esg_jax.evaluation.accumulator import Accumulator
from esg_jax.evaluation.instances import as_instances
from esg_jax.evaluation.rle import RLE, EvaluationError

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
            pred, target = (_as_rle(phrase, name, f"image {image_id}, phrase {i}") for name in ("pred", "gt"))
            _same_size(pred, target, f"image {image_id}, phrase {i}")
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


def _as_rle(record: Mapping[str, Any], name: str, where: str) -> RLE:
    if name not in record:
        raise EvaluationError(f"{where}: {name!r} is missing")
    value = record[name]
    if isinstance(value, Mapping):
        if "size" not in value:
            raise EvaluationError(f"{where}: {name!r} is no RLE, it has no 'size'")
        return rle.from_annotation(value, value["size"], f"{where}, {name}")
    value = np.asarray(value)
    if value.ndim != 2:
        raise EvaluationError(f"{where}: {name!r} must be an RLE or a mask (H, W), got shape {value.shape}")
    return rle.encode(value[None])[0]


def _same_size(pred: RLE, target: RLE, where: str) -> None:
    if list(pred["size"]) != list(target["size"]):
        raise EvaluationError(f"{where}: prediction has size {pred['size']}, ground truth {target['size']}")


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


class ReferringSegmentation(Accumulator):
    """cIoU and gIoU of referring and reasoning segmentation, arithmetic of LISA's `validate`.

    cIoU = summed intersections / summed unions; gIoU = mean per item of I / (U + 1e-5), 1 when both masks are empty.
    An item is one sentence. Pixels of an `ignore` mask are left out of both masks. With sentences that mean nothing
    (gRefCOCO, Liu et al. 2023): N-acc is the share of them answered with an empty mask, T-acc the share
    of the others answered with any.
    """

    def add(self, image_id: Any, items: Sequence[Mapping[str, Any]]) -> None:
        """Scores the items of one image: each with `pred`, `gt` and perhaps `ignore` (RLE or bool (H, W))."""
        counts = []
        for i, item in enumerate(items):
            where = f"image {image_id}, item {i}"
            pred, target = (_as_rle(item, name, where) for name in ("pred", "gt"))
            _same_size(pred, target, where)
            masks = [rle.decode(m) for m in (pred, target)]
            if item.get("ignore") is not None:
                ignore = _as_rle(item, "ignore", where)
                _same_size(pred, ignore, where)
                keep = ~rle.decode(ignore)
                masks = [m & keep for m in masks]
            shared, union = masks[0] & masks[1], masks[0] | masks[1]
            counts.append([int(area.sum()) for area in (shared, union, *masks)])
        self._store(image_id, np.array(counts, np.int64).reshape(-1, 4))

    def result(self) -> dict[str, Any]:
        """`cIoU` (GLEE: oIoU), `gIoU`, `mIoU` (plain mean of items whose union is not empty), `P@0.5`, `num_items`.

        Also `N-acc` and `T-acc`, NaN without items of their kind.
        """
        counts = np.concatenate([*self._ordered(), np.zeros((0, 4), np.int64)])
        if not len(counts):
            return {name: float("nan") for name in ("cIoU", "gIoU", "mIoU", "P@0.5", "N-acc", "T-acc")}
        shared, union, predicted, target = counts.T.astype(np.float64)
        nothing = target == 0
        per_item = shared / (union + 1e-5) + (union == 0)
        plain = shared[union > 0] / union[union > 0]
        return {
            "cIoU": float(shared.sum() / (union.sum() + 1e-10)),
            "gIoU": float(per_item.mean()),
            "mIoU": float(plain.mean()) if plain.size else float("nan"),
            "P@0.5": float((per_item > 0.5).mean()),
            "N-acc": float((predicted[nothing] == 0).mean()) if nothing.any() else float("nan"),
            "T-acc": float((predicted[~nothing] > 0).mean()) if (~nothing).any() else float("nan"),
            "num_items": len(counts),
            "total_intersection": int(shared.sum()),
            "total_union": int(union.sum()),
            "iou_per_item": per_item.tolist(),
        }


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
