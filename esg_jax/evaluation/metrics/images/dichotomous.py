"""Measures of dichotomous image segmentation (Qin et al., ECCV 2022): F, weighted F, MAE, S, E.

Grey-level predictions against binary ground truth. Definitions and edge cases follow the MATLAB toolbox as ported by
`pysodmetrics` (which pins NumPy and scikit-image versions that exclude current ones): every prediction is stretched to
0..1 by its own minimum and maximum; curves over 256 thresholds are averaged over images before the maximum is taken.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy import ndimage

from esg_jax.evaluation.metrics.accumulator import Accumulator
from esg_jax.evaluation.metrics.errors import EvaluationError
from esg_jax.evaluation.metrics.images import correction_effort

_EPS = np.spacing(1)
BETA2 = 0.3  # weight of precision in F
ALPHA = 0.5  # object against region part in S


class DichotomousMeasures(Accumulator):
    """All measures of DIS5K tables.

    Args:
        correction_effort: also HCE, which needs OpenCV and scikit-image.
    """

    def __init__(self, *, correction_effort: bool = True) -> None:
        super().__init__()
        self.correction_effort = correction_effort

    def add(self, image_id: Any, prediction: UInt8[np.ndarray, "h w"], ground_truth: UInt8[np.ndarray, "h w"]) -> None:
        """Scores one image: grey values 0..255; ground truth is foreground above 128.

        Raises:
            EvaluationError: not 8-bit single-channel images of equal size.
        """
        for role, image in (("prediction", prediction), ("ground truth", ground_truth)):
            if np.asarray(image).ndim != 2 or np.asarray(image).dtype != np.uint8:
                raise EvaluationError(
                    f"image {image_id}: the {role} must be 8-bit grey, got {np.asarray(image).dtype} "
                    f"of shape {np.shape(image)}"
                )
        if prediction.shape != ground_truth.shape:
            raise EvaluationError(
                f"image {image_id}: prediction has {prediction.shape} pixels, ground truth {ground_truth.shape}"
            )
        target = ground_truth > 128
        pred = _stretch(prediction)
        record = {
            "F_curve": _f_curve(pred, target),
            "F_adaptive": _f_adaptive(pred, target),
            "wF": weighted_f(pred, target),
            "S": structure(pred, target),
            "E_curve": _e_curve(pred, target),
            "E_adaptive": _e_adaptive(pred, target),
            "MAE": float(np.mean(np.abs(pred - target))),
        }
        if self.correction_effort:
            record["HCE_parts"] = correction_effort.correction_effort(prediction > 128, target)
        self._store(image_id, record)

    def result(self) -> dict[str, Any]:
        """`maxF`, `meanF`, `adpF`, `wF`, `MAE`, `S`, `E_mean` (the E of the papers), `E_max`, `E_adp`, `HCE`, the two
        curves, and per-image lists.
        """
        records = self._ordered()
        if not records:
            return {"maxF": float("nan")}
        columns = {name: np.array([r[name] for r in records], np.float64) for name in records[0]}
        f, e = columns["F_curve"].mean(0), columns["E_curve"].mean(0)
        out: dict[str, Any] = {
            "maxF": float(f.max()),
            "meanF": float(f.mean()),
            "adpF": float(columns["F_adaptive"].mean()),
            "wF": float(columns["wF"].mean()),
            "MAE": float(columns["MAE"].mean()),
            "S": float(columns["S"].mean()),
            "E_mean": float(e.mean()),
            "E_max": float(e.max()),
            "E_adp": float(columns["E_adaptive"].mean()),
        }
        if "HCE_parts" in columns:
            out["HCE"] = float(columns["HCE_parts"].sum(1).mean())
            out["HCE_parts_per_image"] = columns["HCE_parts"].tolist()
        out |= {"F_curve": f.tolist(), "E_curve": e.tolist()}
        out |= {f"{name}_per_image": columns[name].tolist() for name in ("wF", "S", "MAE")}
        return out

    def draw(self):
        """F and E over the threshold, for `--curves`."""
        result = self.result()

        def draw(axes):
            for name in ("F", "E"):
                axes.plot(np.arange(255, -1, -1), result[f"{name}_curve"], label=name)
            axes.set(xlim=(0, 255), ylim=(0, 1.02))
            axes.legend()

        return [("f_and_e_over_threshold.png", draw, "threshold", "mean over images")]


def _stretch(image: UInt8[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    pred = image / 255
    low, high = pred.min(), pred.max()
    return (pred - low) / (high - low) if high != low else pred


def _positives(pred: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """True and false positives at the thresholds 255, 254, ..., 0."""
    levels = (pred * 255).astype(np.uint8)
    counts = [np.bincount(levels[mask], minlength=256)[::-1].cumsum() for mask in (target, ~target)]
    return counts[0], counts[1]


def _f_curve(pred: np.ndarray, target: np.ndarray) -> Float[np.ndarray, "256"]:
    true, false = _positives(pred, target)
    precision = true / np.maximum(true + false, 1)
    recall = true / max(np.count_nonzero(target), 1)
    top = (1 + BETA2) * precision * recall
    return top / np.where(top == 0, 1, BETA2 * precision + recall)


def _adaptive(pred: np.ndarray) -> Bool[np.ndarray, "h w"]:
    """Prediction at twice its mean."""
    return pred >= min(2 * pred.mean(), 1)


def _f_adaptive(pred: np.ndarray, target: np.ndarray) -> float:
    binary = _adaptive(pred)
    true = np.count_nonzero(binary & target)
    if not true:
        return 0.0
    precision, recall = true / np.count_nonzero(binary), true / np.count_nonzero(target)
    return (1 + BETA2) * precision * recall / (BETA2 * precision + recall)


def weighted_f(pred: Float[np.ndarray, "h w"], target: Bool[np.ndarray, "h w"]) -> float:
    """Weighted F (Margolin et al., CVPR 2014): errors spread over neighbours and weighted by distance; 0 without
    foreground."""
    if not target.any():
        return 0.0
    distance, (rows, columns) = ndimage.distance_transform_edt(~target, return_indices=True)
    error = np.abs(pred - target)
    # A background pixel depends on the error at the closest foreground pixel.
    spread = np.where(target, error, error[rows, columns])
    offset = np.arange(-3, 4)
    kernel = np.exp(-(offset[:, None] ** 2 + offset[None, :] ** 2) / (2 * 5**2))
    smooth = ndimage.convolve(spread, kernel / kernel.sum(), mode="constant", cval=0)
    least = np.where(target & (smooth < error), smooth, error)
    weighted = least * np.where(target, 1.0, 2 - np.exp(np.log(0.5) / 5 * distance))
    true = target.sum() - weighted[target].sum()
    false = weighted[~target].sum()
    recall = 1 - weighted[target].mean()
    precision = true / (true + false + _EPS)
    return float(2 * recall * precision / (recall + precision + _EPS))


def structure(pred: Float[np.ndarray, "h w"], target: Bool[np.ndarray, "h w"]) -> float:
    """S-measure (Fan et al., ICCV 2017)."""
    share = target.mean()
    if share == 0:
        return float(1 - pred.mean())
    if share == 1:
        return float(pred.mean())
    objects = share * _object_score(pred[target]) + (1 - share) * _object_score(1 - pred[~target])
    # Quadrants around the centroid of the foreground, weighted by their size.
    y, x = (int(v) + 1 for v in np.argwhere(target).mean(axis=0).round())
    regions = 0.0
    for rows in (slice(0, y), slice(y, None)):
        for columns in (slice(0, x), slice(x, None)):
            part = target[rows, columns]
            if part.size:
                regions += part.size / target.size * _similarity(pred[rows, columns], part)
    return float(max(0.0, ALPHA * objects + (1 - ALPHA) * regions))


def _object_score(values: np.ndarray) -> float:
    mean = values.mean()
    deviation = values.std(ddof=1) if values.size > 1 else 0.0
    return 2 * mean / (mean**2 + 1 + deviation + _EPS)


def _similarity(pred: np.ndarray, target: np.ndarray) -> float:
    """SSIM of a whole region."""
    x, y = pred.mean(), target.mean()
    count = pred.size - 1 + _EPS
    variance = (np.sum((pred - x) ** 2) + np.sum((target - y) ** 2)) / count
    covariance = np.sum((pred - x) * (target - y)) / count
    top = 4 * x * y * covariance
    bottom = (x**2 + y**2) * variance
    if top != 0:
        return top / (bottom + _EPS)
    return 1.0 if bottom == 0 else 0.0


def _e_curve(pred: np.ndarray, target: np.ndarray) -> Float[np.ndarray, "256"]:
    return _alignment(*_positives(pred, target), target)


def _e_adaptive(pred: np.ndarray, target: np.ndarray) -> float:
    binary = _adaptive(pred)
    return float(_alignment(np.count_nonzero(binary & target), np.count_nonzero(binary & ~target), target))


def _alignment(true: Any, false: Any, target: np.ndarray) -> Any:
    """E-measure (Fan et al., IJCAI 2018) of a binary prediction known by its true and false positives.

    The enhanced alignment of a pixel depends only on its two binary values, so four counts replace the maps.
    """
    size, positives = target.size, np.count_nonzero(target)
    predicted = true + false
    if positives == 0:
        total = size - predicted
    elif positives == size:
        total = predicted
    else:
        pred_mean, target_mean = predicted / size, positives / size
        missed = positives - true
        total = 0.0
        for count, p, t in (
            (true, 1, 1),
            (false, 1, 0),
            (missed, 0, 1),
            (size - predicted - missed, 0, 0),
        ):
            a, b = p - pred_mean, t - target_mean
            total = total + count * (2 * a * b / (a**2 + b**2 + _EPS) + 1) ** 2 / 4
    return total / (size - 1 + _EPS)
