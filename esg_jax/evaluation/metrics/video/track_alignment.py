"""How well tracks go together over a whole video: what HOTA and TETA share."""

from collections.abc import Iterable

import numpy as np

_EPS = np.finfo("float").eps


def alignment(
    frames: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]], num_targets: int, num_preds: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Jaccard-like overlap (targets, preds) of tracks over a video, and the number of frames of either.

    Args:
        frames: of every frame the contiguous ids of its G targets and D predictions, and their similarity (G, D).
        num_targets, num_preds: tracks of the video.
    """
    shared = np.zeros((num_targets, num_preds))
    target_count, pred_count = np.zeros((num_targets, 1)), np.zeros((1, num_preds))
    for targets, preds, similarity in frames:
        total = similarity.sum(0, keepdims=True) + similarity.sum(1, keepdims=True) - similarity
        share = np.divide(similarity, total, out=np.zeros(similarity.shape), where=total > _EPS)
        shared[targets[:, None], preds[None, :]] += share
        target_count[targets] += 1
        pred_count[0, preds] += 1
    return shared / np.maximum(target_count + pred_count - shared, _EPS), target_count, pred_count


def association(
    matches: np.ndarray, true: np.ndarray, target_count: np.ndarray, pred_count: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Accuracy, recall and precision of association at every alpha, averaged over the `true` matches.

    Args:
        matches: frames in which two tracks were matched, (alpha, targets, preds).
        true: all matches at every alpha.
        target_count, pred_count: from `alignment`.
    """
    totals = target_count + pred_count - matches, target_count, pred_count
    return tuple((matches * (matches / np.maximum(1, total))).sum((1, 2)) / np.maximum(1, true) for total in totals)
