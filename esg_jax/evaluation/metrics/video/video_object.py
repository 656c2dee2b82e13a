"""J, F and J&F of video object segmentation (Pont-Tuset et al., DAVIS 2017), YouTube-VOS G, Ref-YouTube-VOS.

Equal to `davis2017-evaluation`. The YouTube-VOS and MOSE servers are closed; their aggregation here is the published
description: objects count from the frame after their first annotation, G is the mean of J and F over seen and unseen
categories.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int
from scipy.spatial import cKDTree

from esg_jax.evaluation.metrics.accumulator import Accumulator
from esg_jax.evaluation.metrics.errors import EvaluationError

VOID = 255

Protocol = Literal["davis", "youtube_vos", "all_frames"]


def region_similarity(pred: Bool[np.ndarray, "h w"], target: Bool[np.ndarray, "h w"]) -> float:
    """J: IoU; 1 when both masks are empty."""
    union = np.count_nonzero(pred | target)
    return np.count_nonzero(pred & target) / union if union else 1.0


def contour_accuracy(pred: Bool[np.ndarray, "h w"], target: Bool[np.ndarray, "h w"], tolerance: float = 0.008) -> float:
    """F: F1 of boundary pixels that lie within ceil(tolerance x diagonal) pixels of the other boundary."""
    radius = math.ceil(tolerance * float(np.linalg.norm(target.shape)))
    pred_points, target_points = (np.argwhere(_outline(mask)) for mask in (pred, target))
    if not len(pred_points) or not len(target_points):
        return float(len(pred_points) == len(target_points))
    precision = _near(pred_points, target_points, radius)
    recall = _near(target_points, pred_points, radius)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _near(points: Int[np.ndarray, "n 2"], others: Int[np.ndarray, "m 2"], radius: int) -> float:
    """Share of `points` within `radius` of any of `others`: what dilating with a disk would find, without images."""
    distance, _ = cKDTree(others).query(points, distance_upper_bound=radius + 0.5)
    return float(np.count_nonzero(distance <= radius)) / len(points)


def _outline(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Pixels that differ from their right, lower or lower-right neighbour; the last row and column look only inward."""
    right, below = mask.copy(), mask.copy()
    right[:, :-1] = mask[:, 1:]
    below[:-1] = mask[1:]
    diagonal = mask.copy()
    diagonal[:-1, :-1] = mask[1:, 1:]
    out = (mask ^ right) | (mask ^ below) | (mask ^ diagonal)
    out[-1] = (mask ^ right)[-1]
    out[:, -1] = (mask ^ below)[:, -1]
    out[-1, -1] = False
    return out


class VideoObjectSegmentation(Accumulator):
    """J and F per object, averaged over the objects of all sequences.

    Args:
        protocol: "davis": first and last frame left out, void (255) is background, object count from the first frame;
            "youtube_vos" (also MOSE): an object counts on the annotated frames after its first; "all_frames"
            (Ref-YouTube-VOS, one expression per sequence): every frame.
    """

    unit = "sequence"

    def __init__(self, protocol: Protocol = "davis") -> None:
        super().__init__()
        if protocol not in ("davis", "youtube_vos", "all_frames"):
            raise EvaluationError(f"protocol is {protocol!r}; choose davis, youtube_vos or all_frames")
        self.protocol = protocol

    def add(
        self,
        sequence: Any,
        frames: Iterable[tuple[Int[np.ndarray, "h w"], Int[np.ndarray, "h w"]]],
        objects: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> None:
        """Scores one sequence; frames are read one at a time.

        Args:
            sequence: sortable name.
            frames: (prediction, ground truth) label maps in time order, 0 background, 255 void.
            objects: for "youtube_vos": object id -> `first_frame` (index) and `seen` (bool). Default: the ids of the
                first frame, all seen.

        Raises:
            EvaluationError: sizes differ, or a predicted id that no object has.
        """
        scores: dict[int, list[tuple[float, float]]] = {}
        first: dict[int, int] = {}
        held = None
        for i, (pred, target) in enumerate(frames):
            pred, target = np.asarray(pred), np.asarray(target)
            if pred.shape != target.shape or target.ndim != 2:
                raise EvaluationError(f"{sequence}, frame {i}: prediction {pred.shape}, ground truth {target.shape}")
            if i == 0:
                first = self._objects(sequence, target, objects)
                scores = {uid: [] for uid in first}
            if self.protocol == "davis":
                # One frame late, because the last frame does not count.
                if held is not None:
                    self._score_frame(sequence, *held, first, scores)
                held = (i, pred, target) if i else None
            else:
                self._score_frame(sequence, i, pred, target, first, scores)
        if not first:
            raise EvaluationError(f"{sequence}: no frames, or no object in the first one")
        seen = {uid: bool((objects or {}).get(uid, {}).get("seen", True)) for uid in first}
        arrays = {uid: np.array(values, np.float64).reshape(-1, 2) for uid, values in scores.items()}
        self._store(sequence, (sequence, arrays, seen))

    def _objects(self, sequence: Any, target: np.ndarray, objects: Mapping | None) -> dict[int, int]:
        """First frame of every object."""
        if objects is not None:
            return {int(uid): int(about.get("first_frame", 0)) for uid, about in objects.items()}
        ids = target[target != VOID]
        count = int(ids.max()) if ids.size else 0
        return dict.fromkeys(range(1, count + 1), 0)

    def _score_frame(self, sequence, index, pred, target, first, scores) -> None:
        # Void is background in the semi-supervised evaluation: predicting an object there is wrong.
        strange = set(np.unique(pred).tolist()) - {0, VOID} - set(first)
        if strange:
            raise EvaluationError(
                f"{sequence}, frame {index}: predicted object {min(strange)} is not annotated; ids are {sorted(first)}"
            )
        for uid, start in first.items():
            if self.protocol == "youtube_vos" and index <= start:
                continue
            p, t = pred == uid, target == uid
            scores[uid].append((region_similarity(p, t), contour_accuracy(p, t)))

    def result(self) -> dict[str, Any]:
        """`JF`, `J`, `F`, their recall (share of frames above 0.5) and decay, for "youtube_vos" `J_s`, `F_s`, `J_u`,
        `F_u`, `G`; per-object means and per-frame lists keyed ``<sequence>_<object>``.
        """
        objects, seen = {}, {}
        for sequence, arrays, flags in self._ordered():
            for uid, values in arrays.items():
                if len(values):
                    objects[f"{sequence}_{uid}"] = values
                    seen[f"{sequence}_{uid}"] = flags[uid]
        out: dict[str, Any] = {}
        means = {name: values.mean(0) for name, values in objects.items()}
        both = np.array(list(means.values())).reshape(-1, 2)
        for k, letter in enumerate("JF"):
            out[letter] = _mean(both[:, k])
            out[f"{letter}_recall"] = _mean([(values[:, k] > 0.5).mean() for values in objects.values()])
            out[f"{letter}_decay"] = _mean([_decay(values[:, k]) for values in objects.values()])
        out = {"JF": (out["J"] + out["F"]) / 2, **out}
        if self.protocol == "youtube_vos":
            for suffix, wanted in (("s", True), ("u", False)):
                group = np.array([m for name, m in means.items() if seen[name] == wanted]).reshape(-1, 2)
                out[f"J_{suffix}"], out[f"F_{suffix}"] = _mean(group[:, 0]), _mean(group[:, 1])
            out["G"] = float(np.mean([out[name] for name in ("J_s", "F_s", "J_u", "F_u")]))
        out["num_objects"] = len(objects)
        for k, letter in enumerate("JF"):
            out[f"{letter}_per_object"] = {name: float(m[k]) for name, m in means.items()}
            out[f"{letter}_per_frame"] = {name: values[:, k].tolist() for name, values in objects.items()}
        return out


def _mean(values: Any) -> float:
    values = np.asarray(values, np.float64)
    return float(values.mean()) if values.size else float("nan")


def _decay(values: np.ndarray) -> float:
    """Mean of the first quarter of the frames minus that of the last; quarters share their end frames."""
    ends = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1
    return float(values[ends[0] : ends[1] + 1].mean() - values[ends[3] : ends[4] + 1].mean())
