"""HOTA (Luiten et al., IJCV 2020) and its use by BURST, equal to TrackEval."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment

from esg_jax.evaluation.metrics.accumulator import Accumulator
from esg_jax.evaluation.metrics.errors import EvaluationError
from esg_jax.evaluation.metrics.video.track_alignment import alignment, association
from esg_jax.masks import rle
from esg_jax.masks.rle import RLE

ALPHAS = np.arange(0.05, 0.99, 0.05)
MAX_PER_FRAME = 300
_EPS = np.finfo("float").eps


@dataclasses.dataclass(frozen=True)
class Frame:
    """Objects of one frame: N track ids (int), class ids (int), masks, and for predictions scores (float)."""

    tracks: np.ndarray
    labels: np.ndarray
    rles: list[RLE]
    scores: np.ndarray | None = None

    def select(self, keep: np.ndarray) -> "Frame":
        """The objects at integer positions `keep`."""
        scores = None if self.scores is None else self.scores[keep]
        return Frame(self.tracks[keep], self.labels[keep], [self.rles[i] for i in keep], scores)


def hota_counts(
    target_ids: Sequence[Int[np.ndarray, "g"]],
    pred_ids: Sequence[Int[np.ndarray, "d"]],
    similarities: Sequence[Float[np.ndarray, "g d"]],
) -> dict[str, Float[np.ndarray, "19"]]:
    """TP, FN, FP, AssA, AssRe, AssPr and the summed overlap of the TP, at every alpha, of one sequence and class."""
    targets, target_ids = _contiguous(target_ids)
    preds, pred_ids = _contiguous(pred_ids)
    frames = list(zip(target_ids, pred_ids, similarities, strict=True))
    # How well two tracks go together over the sequence decides, with the overlap, who is matched in a frame.
    together, *frame_counts = alignment(frames, targets, preds)
    out = {name: np.zeros(len(ALPHAS)) for name in ("TP", "FN", "FP", "AssA", "AssRe", "AssPr", "overlap")}
    matches = np.zeros((len(ALPHAS), targets, preds))
    for t, p, similarity in frames:
        rows, columns = linear_sum_assignment(-together[t[:, None], p[None, :]] * similarity)
        overlap = similarity[rows, columns]
        hit = overlap[None, :] >= ALPHAS[:, None] - _EPS
        true = hit.sum(1)
        out["TP"] += true
        out["FN"] += len(t) - true
        out["FP"] += len(p) - true
        out["overlap"] += (hit * overlap).sum(1)
        matches[:, t[rows], p[columns]] += hit
    out["AssA"], out["AssRe"], out["AssPr"] = association(matches, out["TP"], *frame_counts)
    return out


def _contiguous(ids: Sequence[np.ndarray]) -> tuple[int, list[np.ndarray]]:
    unique = np.unique(np.concatenate([np.zeros(0, np.int64), *ids]))
    return len(unique), [np.searchsorted(unique, frame) for frame in ids]


def _combine(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Fields of several sequences (or classes) together: counts add up, ratios are weighted by TP."""
    out = {name: np.sum([p[name] for p in parts], axis=0) for name in ("TP", "FN", "FP", "overlap")}
    for name in ("AssA", "AssRe", "AssPr"):
        out[name] = np.sum([p[name] * p["TP"] for p in parts], axis=0) / np.maximum(1, out["TP"])
    return out


def _fields(counts: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """All HOTA fields; array per alpha."""
    true, missed, false = counts["TP"], counts["FN"], counts["FP"]
    out = {"HOTA_TP": true, "HOTA_FN": missed, "HOTA_FP": false}
    out |= {name: counts[name] for name in ("AssRe", "AssPr", "AssA")}
    out["LocA"] = np.maximum(1e-10, counts["overlap"]) / np.maximum(1e-10, true)
    out["DetRe"] = true / np.maximum(1, true + missed)
    out["DetPr"] = true / np.maximum(1, true + false)
    out["DetA"] = true / np.maximum(1, true + missed + false)
    out["HOTA"] = np.sqrt(out["DetA"] * out["AssA"])
    out["OWTA"] = np.sqrt(out["DetRe"] * out["AssA"])
    out["HOTA(0)"], out["LocA(0)"] = out["HOTA"][0], out["LocA"][0]
    out["HOTALocA(0)"] = out["HOTA(0)"] * out["LocA(0)"]
    return out


def _means(fields: Mapping[str, Any]) -> dict[str, Any]:
    out = {name: float(np.mean(value)) for name, value in fields.items()}
    out["HOTA_per_alpha"] = np.asarray(fields["HOTA"]).tolist()
    return out


class BurstHOTA(Accumulator):
    """Class-guided HOTA of mask tracks (BURST, Athar et al., WACV 2023).

    Classes are scored separately, those with ground truth. Predictions without a match (IoU >= 0.5) do not count where
    the class is not annotated exhaustively, nor in frames without its ground truth unless the sequence lists it as
    absent. `HOTA` is the mean over classes (official `cls_comb_cls_av`).

    Args:
        overlap: "box" compares the boxes around the masks. TrackEval, and so every published number, does this for
            BURST although its code says masks: the loader stores boxes, and `pycocotools.iou` of boxes is box IoU.
            "mask" compares the masks.
    """

    unit = "sequence"

    def __init__(self, overlap: str = "box") -> None:
        super().__init__()
        if overlap not in ("box", "mask"):
            raise EvaluationError(f"overlap is {overlap!r}; choose box or mask")
        self.overlap = overlap

    def add(
        self,
        sequence: Any,
        prediction: Sequence[Frame],
        ground_truth: Sequence[Frame],
        *,
        negative: Sequence[int] = (),
        not_exhaustive: Sequence[int] = (),
    ) -> None:
        """Scores one sequence; both lists hold one `Frame` per annotated frame.

        Args:
            sequence: sortable id.
            prediction, ground_truth: track ids must be unique within a frame.
            negative: classes known to be absent.
            not_exhaustive: classes of which only some objects are annotated.
        """
        if len(prediction) != len(ground_truth):
            raise EvaluationError(f"sequence {sequence}: {len(prediction)} frames for {len(ground_truth)} annotated")
        prediction = [_best(frame) for frame in prediction]
        for role, frames in (("prediction", prediction), ("ground truth", ground_truth)):
            for i, frame in enumerate(frames):
                if len(np.unique(frame.tracks)) != len(frame.tracks):
                    raise EvaluationError(f"sequence {sequence}, frame {i}: a track id occurs twice in the {role}")
        if self.overlap == "mask":
            overlaps = [rle.iou(t.rles, p.rles) for t, p in zip(ground_truth, prediction, strict=True)]
        else:
            overlaps = [
                rle.box_iou(rle.boxes(t.rles), rle.boxes(p.rles)) for t, p in zip(ground_truth, prediction, strict=True)
            ]
        annotated = set(np.concatenate([np.zeros(0, int), *(f.labels for f in ground_truth)]).tolist())
        classes = annotated | set(np.concatenate([np.zeros(0, int), *(f.labels for f in prediction)]).tolist())
        record = {}
        for label in sorted(classes):
            target_ids, pred_ids, similarities = [], [], []
            for target, pred, overlap in zip(ground_truth, prediction, overlaps, strict=True):
                t, p = np.flatnonzero(target.labels == label), np.flatnonzero(pred.labels == label)
                similarity = overlap[np.ix_(t, p)]
                if label in not_exhaustive or (not len(t) and label not in negative):
                    kept = _matched_columns(similarity)
                    p, similarity = p[kept], similarity[:, kept]
                target_ids.append(target.tracks[t])
                pred_ids.append(pred.tracks[p])
                similarities.append(similarity)
            record[int(label)] = (label in annotated, hota_counts(target_ids, pred_ids, similarities))
        self._store(sequence, record)

    def result(self) -> dict[str, Any]:
        """Fields averaged over alpha: class mean on top, `detection_averaged`, and `per_class`."""
        sequences = self._ordered()
        classes = sorted({c for s in sequences for c, (annotated, _) in s.items() if annotated})
        if not classes:
            return {"HOTA": float("nan")}
        counts = {c: _combine([s[c][1] for s in sequences if c in s]) for c in classes}
        fields = {c: _fields(v) for c, v in counts.items()}
        together = {}
        for name in next(iter(fields.values())):
            values = [f[name] for f in fields.values()]
            together[name] = np.sum(values, axis=0) if name.startswith("HOTA_") else np.mean(values, axis=0)
        return {
            **_means(together),
            "num_classes": len(classes),
            "detection_averaged": _means(_fields(_combine(list(counts.values())))),
            "per_class": {c: _means(f) for c, f in fields.items()},
        }


def _best(frame: Frame) -> Frame:
    if frame.scores is None or len(frame.tracks) <= MAX_PER_FRAME:
        return frame
    return frame.select(np.argsort(-frame.scores, kind="mergesort")[:MAX_PER_FRAME])


def _matched_columns(similarity: np.ndarray) -> np.ndarray:
    """Predictions (columns) that the best assignment pairs at an overlap of 0.5 or more."""
    if not similarity.size:
        return np.zeros(0, np.int64)
    good = np.where(similarity < 0.5 - _EPS, 0, similarity)
    rows, columns = linear_sum_assignment(-good)
    return np.sort(columns[good[rows, columns] > _EPS])
