"""AP of video instance segmentation, YouTube-VIS and OVIS (Yang et al., ICCV 2019), equal to `ytvoseval`."""

import warnings
from collections.abc import Mapping, Sequence
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
from esg_jax.masks import rle
from esg_jax.masks.rle import RLE

# Mean area over the visible frames; squares of 128 and 256 pixels.
AREA_RANGES = ((0.0, 1e10), (0.0, 128.0**2), (128.0**2, 256.0**2), (256.0**2, 1e10))
MAX_DETS = (1, 10, 100)


class VideoInstanceAP(Accumulator):
    """Track AP: the overlap of two tracks is summed intersections over summed unions of all frames.

    Args:
        categories: class ids.
    """

    unit = "video"

    def __init__(self, categories: Sequence[int]) -> None:
        super().__init__()
        self.categories = tuple(sorted(set(categories)))

    def add(
        self,
        video_id: Any,
        prediction: Sequence[Mapping[str, Any]],
        ground_truth: Sequence[Mapping[str, Any]],
        size: Sequence[int],
        length: int,
    ) -> None:
        """Scores one video.

        Args:
            video_id: sortable id.
            prediction: records with `segmentations` (one RLE or None per frame), `category_id`, `score`.
            ground_truth: records with `segmentations`, `category_id`, `iscrowd`, and `areas` per frame (counted when
                absent).
            size: (height, width) of the frames.
            length: number of frames.
        """
        preds = [_tracks(r, f"video {video_id}, prediction {i}", size, length) for i, r in enumerate(prediction)]
        targets = [
            _tracks(r, f"video {video_id}, annotation {r.get('id', i)}", size, length)
            for i, r in enumerate(ground_truth)
        ]
        scores = np.array([r["score"] for r in prediction], np.float64)
        if not np.isfinite(scores).all():
            bad = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise EvaluationError(f"video {video_id}, prediction {bad}: score is {scores[bad]}")
        pred_labels = np.array([r["category_id"] for r in prediction], np.int64)
        target_labels = np.array([r["category_id"] for r in ground_truth], np.int64)
        crowd = np.array([bool(r.get("iscrowd", 0)) for r in ground_truth], bool)
        pred_areas = np.array([_mean_area(rle.areas([m for m in track if m])) for track in preds])
        target_areas = np.array(
            [
                _mean_area(r["areas"] if "areas" in r else rle.areas([m for m in track if m]))
                for r, track in zip(ground_truth, targets, strict=True)
            ]
        )
        record: dict[int, Matches] = {}
        for label in np.union1d(pred_labels, target_labels):
            p = np.flatnonzero(pred_labels == label)
            p = p[np.argsort(-scores[p], kind="mergesort")][: MAX_DETS[-1]]
            t = np.flatnonzero(target_labels == label)
            record[int(label)] = match(
                track_iou([preds[i] for i in p], [targets[i] for i in t]),
                scores[p],
                pred_areas[p],
                target_areas[t],
                crowd[t],
                crowd[t],
                np.asarray(AREA_RANGES),
            )
        self._store(video_id, record)

    def result(self) -> dict[str, Any]:
        """AP, AP50, AP75, APs/m/l, AR1/10/100, ARs/m/l, `AP_per_category`; -1 for empty buckets."""
        videos = self._ordered()
        strange = {c for video in videos for c in video} - set(self.categories)
        if strange:
            warnings.warn(f"predictions of classes {sorted(strange)[:5]} are left out", stacklevel=2)
        by_category = {c: [v[c] for v in videos if c in v] for c in self.categories}
        curves = {c: [curve(m, n) if m else None for n in MAX_DETS] for c, m in by_category.items()}
        last = [row[-1] for row in curves.values() if row[-1]]
        p = np.array([c.precision for c in last]).reshape(-1, 4, 10, 101)
        r = np.array([c.recall for c in last]).reshape(-1, 4, 10)
        out: dict[str, Any] = average_precisions(p)
        for k, count in enumerate(MAX_DETS):
            out[f"AR{count}"] = mean_valid(np.array([row[k].recall[0] for row in curves.values() if row[k]]))
        out |= {f"AR{name}": mean_valid(r[:, i]) for i, name in enumerate("sml", start=1)}
        out["AP_per_category"] = {c: mean_valid(row[-1].precision[0]) if row[-1] else -1.0 for c, row in curves.items()}
        return out if any(len(m.scores) for video in videos for m in video.values()) else nothing_predicted(out)


def track_iou(preds: Sequence[Sequence[RLE | None]], targets: Sequence[Sequence[RLE | None]]) -> np.ndarray:
    """float64 (D, G): IoU of tracks; a frame where only one is visible adds its whole mask to the union."""
    shared = np.zeros((len(preds), len(targets)))
    union = np.zeros((len(preds), len(targets)))
    if not shared.size:
        return shared
    for frame in range(len(preds[0])):
        d = [i for i, track in enumerate(preds) if track[frame]]
        g = [i for i, track in enumerate(targets) if track[frame]]
        pred_area, target_area = np.zeros(len(preds)), np.zeros(len(targets))
        pred_area[d] = rle.areas([preds[i][frame] for i in d])
        target_area[g] = rle.areas([targets[i][frame] for i in g])
        inter = np.zeros(shared.shape)
        if d and g:
            inter[np.ix_(d, g)] = rle.intersections([preds[i][frame] for i in d], [targets[i][frame] for i in g])
        shared += inter
        union += pred_area[:, None] + target_area[None, :] - inter
    return np.divide(shared, union, out=np.zeros(shared.shape), where=union > 0)


def _tracks(record: Mapping[str, Any], where: str, size: Sequence[int], length: int) -> list[RLE | None]:
    masks = record.get("segmentations")
    if not isinstance(masks, (list, tuple)) or len(masks) != length:
        got = "none" if masks is None else len(masks)
        raise EvaluationError(f"{where}: 'segmentations' needs one entry per frame ({length}), got {got}")
    return [rle.from_annotation(m, size, f"{where}, frame {t}") if m else None for t, m in enumerate(masks)]


def _mean_area(areas: Any) -> float:
    """Mean over visible frames; 0 for a track without any."""
    areas = [a for a in areas if a]
    return float(np.mean(areas)) if areas else 0.0
