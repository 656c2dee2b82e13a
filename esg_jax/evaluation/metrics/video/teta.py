"""TETA (Li et al., ECCV 2022) on TAO, equal to the official `teta` with its TAO settings.

Localisation, association and classification are judged apart. A class looks at predicted tracks of any class that
overlap one of its ground truths (box IoU >= 0.5) in some frame, unless that frame's best assignment gave the track to
another class; everything else in these incompletely annotated videos is neither right nor wrong.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from esg_jax.evaluation.metrics.accumulator import Accumulator
from esg_jax.evaluation.metrics.errors import EvaluationError
from esg_jax.evaluation.metrics.video.track_alignment import alignment, association
from esg_jax.masks import rle

ALPHAS = np.arange(0.0, 0.99, 0.05)
_FIRST_CLASS_ALPHA = 10  # classification counts at alpha >= 0.5
OVERLAP = 0.5
_EPS = np.finfo("float").eps

_COUNTS = ("Loc_TP", "Loc_FN", "Loc_FP", "Cls_TP", "Cls_FN", "Cls_FP")
_ASSOCIATION = ("AssocA", "AssocRe", "AssocPr")


@dataclasses.dataclass(frozen=True)
class BoxFrame:
    """Objects of one frame: track ids int (N,), class ids int (N,), boxes float (N, 4) as x, y, width, height."""

    tracks: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Pair:
    """What one class sees of one frame: G ground truths, D predictions."""

    targets: np.ndarray  # int (G,), contiguous over the video
    preds: np.ndarray  # int (D,), contiguous over the video
    tracks: np.ndarray  # int (D,), predicted track ids as given
    labels: np.ndarray  # int (D,), predicted classes
    candidates: np.ndarray  # bool (D,), overlaps a ground truth here and belongs to no other class
    similarity: np.ndarray  # float (G, D)


class TaoTETA(Accumulator):
    """TETA50 of box tracks, mean over the classes that have ground truth."""

    unit = "video"

    def add(self, video_id: Any, prediction: Sequence[BoxFrame], ground_truth: Sequence[BoxFrame]) -> None:
        """Scores one video.

        Args:
            video_id: sortable id.
            prediction, ground_truth: one `BoxFrame` per image that has ground truth (others do not count).
        """
        if len(prediction) != len(ground_truth):
            raise EvaluationError(f"video {video_id}: {len(prediction)} frames for {len(ground_truth)} annotated")
        for role, frames in (("prediction", prediction), ("ground truth", ground_truth)):
            for i, frame in enumerate(frames):
                if len(np.unique(frame.tracks)) != len(frame.tracks):
                    raise EvaluationError(f"video {video_id}, frame {i}: a track id occurs twice in the {role}")
                if not np.isfinite(frame.boxes).all():
                    raise EvaluationError(f"video {video_id}, frame {i}: a box of the {role} is not finite")
        similarity = [rle.box_iou(t.boxes, p.boxes) for t, p in zip(ground_truth, prediction, strict=True)]
        owners = _owners(prediction, ground_truth, similarity)
        labels = sorted({int(c) for frame in ground_truth for c in frame.labels})
        counts = {}
        wrong: dict[int, np.ndarray] = {}
        for label in labels:
            counts[label] = _count(label, _select(prediction, ground_truth, similarity, label, owners), wrong)
        self._store(video_id, (counts, wrong))

    def result(self) -> dict[str, Any]:
        """All fields averaged over alpha: class mean on top and `per_class`; `*_per_alpha` lists inside the classes."""
        videos = self._ordered()
        labels = sorted({c for counts, _ in videos for c in counts})
        if not labels:
            return {"TETA": float("nan")}
        fields = {}
        for label in labels:
            parts = [counts[label] for counts, _ in videos if label in counts]
            total = {name: np.sum([p[name] for p in parts], axis=0) for name in _COUNTS}
            for _, wrong in videos:
                total["Cls_FP"] = total["Cls_FP"] + wrong.get(label, 0.0)
            for name in _ASSOCIATION:
                weighted = np.sum([p[name] * p["Loc_TP"] for p in parts], axis=0)
                total[name] = weighted / np.maximum(1, total["Loc_TP"])
            fields[label] = _fields(total)
        used = [f for f in fields.values() if (f["Loc_TP"] + f["Loc_FN"] + f["Loc_FP"] > _EPS).any()]
        mean = {
            name: np.sum([f[name] for f in used], axis=0)
            if name in _COUNTS
            else np.mean([f[name] for f in used], axis=0)
            for name in used[0]
        }
        return {
            **{name: float(np.mean(value)) for name, value in mean.items()},
            "num_classes": len(used),
            "per_alpha": _as_lists(mean),
            "per_class": {label: _as_lists(f) for label, f in fields.items()},
        }


def _as_lists(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: np.asarray(value).tolist() for name, value in fields.items()}


def _fields(total: dict[str, np.ndarray]) -> dict[str, Any]:
    out: dict[str, Any] = dict(total)
    for part in ("Loc", "Cls"):
        true, missed, false = (total[f"{part}_{name}"] for name in ("TP", "FN", "FP"))
        out[f"{part}Re"] = true / np.maximum(1, true + missed)
        out[f"{part}Pr"] = true / np.maximum(1, true + false)
        out[f"{part}A"] = true / np.maximum(1, true + missed + false)
    for name in ("ClsRe", "ClsPr", "ClsA"):
        out[name] = float(np.mean(out[name]))
    out["TETA"] = (out["LocA"] + out["AssocA"] + out["ClsA"]) / 3
    return out


def _owners(prediction, ground_truth, similarity) -> list[dict[int, int]]:
    """Per frame, predicted track -> class of the ground truth that the assignment over all classes gives it."""
    out = []
    pairs = _select(prediction, ground_truth, similarity)
    together, *_ = _alignment(pairs)
    for pair, target in zip(pairs, ground_truth, strict=True):
        rows, columns = _assign(pair, together)
        good = pair.similarity[rows, columns] >= OVERLAP - _EPS
        out.append(dict(zip(pair.tracks[columns[good]].tolist(), target.labels[rows[good]].tolist(), strict=True)))
    return out


def _select(prediction, ground_truth, similarity, label=None, owners=None) -> list[_Pair]:
    """The video as class `label` (None: all classes) sees it."""
    rows, candidates = [], []
    for i, (pred, target) in enumerate(zip(prediction, ground_truth, strict=True)):
        rows.append(np.flatnonzero(target.labels == label) if label is not None else np.arange(len(target.labels)))
        overlapping = (similarity[i][rows[i]] >= OVERLAP).any(0)
        if owners is not None:
            foreign = [owners[i].get(int(track), label) != label for track in pred.tracks]
            overlapping &= ~np.array(foreign, bool)
        candidates.append(overlapping)
    # A track that qualifies in one frame takes part in all of them.
    seen = np.unique(np.concatenate([p.tracks[c] for p, c in zip(prediction, candidates, strict=True)] or [[]]))
    known = np.unique(np.concatenate([t.tracks[r] for t, r in zip(ground_truth, rows, strict=True)] or [[]]))
    pairs = []
    for i, (pred, target) in enumerate(zip(prediction, ground_truth, strict=True)):
        columns = np.flatnonzero(np.isin(pred.tracks, seen))
        pairs.append(
            _Pair(
                targets=np.searchsorted(known, target.tracks[rows[i]]),
                preds=np.searchsorted(seen, pred.tracks[columns]),
                tracks=pred.tracks[columns],
                labels=pred.labels[columns],
                candidates=candidates[i][columns],
                similarity=similarity[i][np.ix_(rows[i], columns)],
            )
        )
    return pairs


def _alignment(pairs: Sequence[_Pair]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`alignment` of the tracks that a class sees."""
    num_targets = 1 + max((int(p.targets.max(initial=-1)) for p in pairs), default=-1)
    num_preds = 1 + max((int(p.preds.max(initial=-1)) for p in pairs), default=-1)
    return alignment(((p.targets, p.preds, p.similarity) for p in pairs), num_targets, num_preds)


def _assign(pair: _Pair, together: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return linear_sum_assignment(-together[pair.targets[:, None], pair.preds[None, :]] * pair.similarity)


def _count(label: int, pairs: Sequence[_Pair], wrong: dict[int, np.ndarray]) -> dict[str, np.ndarray]:
    """Counts and association of one class in one video; adds wrongly predicted classes to `wrong`."""
    first = _FIRST_CLASS_ALPHA
    together, *frame_counts = _alignment(pairs)
    out = {name: np.zeros(len(ALPHAS) - (first if name.startswith("Cls") else 0)) for name in _COUNTS}
    matches = np.zeros((len(ALPHAS), *together.shape))
    for pair in pairs:
        if not len(pair.targets):
            continue
        rows, columns = _assign(pair, together)
        hit = pair.similarity[rows, columns] >= ALPHAS[:, None] - _EPS  # (alpha, assigned)
        right = pair.labels[columns] == label
        out["Loc_TP"] += hit.sum(1)
        out["Loc_FN"] += len(pair.targets) - hit.sum(1)
        # Only a track close to a ground truth can be false.
        out["Loc_FP"] += pair.candidates.sum() - (hit & pair.candidates[columns]).sum(1)
        out["Cls_TP"] += (hit & right)[first:].sum(1)
        out["Cls_FN"] += (hit & ~right)[first:].sum(1)
        for k in np.flatnonzero(~right):
            predicted = int(pair.labels[columns[k]])
            wrong[predicted] = wrong.get(predicted, np.zeros(len(ALPHAS) - first)) + hit[first:, k]
        matches[:, pair.targets[rows], pair.preds[columns]] += hit
    return out | dict(zip(_ASSOCIATION, association(matches, out["Loc_TP"], *frame_counts), strict=True))
