"""Human correction effort (Qin et al., ECCV 2022, DIS5K): clicks needed to repair a mask.

Errors thinner than `relax` pixels are forgiven, unless they break the skeleton of the object. What remains costs the
points of polygons drawn along its border with correct regions, and one click per region that touches none.
"""

import numpy as np
from jaxtyping import Bool

from esg_jax.evaluation.metrics.errors import EvaluationError


def correction_effort(
    pred: Bool[np.ndarray, "h w"], target: Bool[np.ndarray, "h w"], relax: int = 5, epsilon: float = 2.0
) -> tuple[int, int, int, int]:
    """(false positive points, false positive regions, false negative points, false negative regions).

    Args:
        pred, target: binary masks.
        relax: forgiven width of errors, in pixels.
        epsilon: tolerance of the polygons, in pixels (Douglas-Peucker).

    Raises:
        EvaluationError: OpenCV or scikit-image is not installed.
    """
    try:
        import cv2
        from skimage.measure import label
        from skimage.morphology import skeletonize
    except ImportError as error:
        raise EvaluationError(f"HCE needs OpenCV and scikit-image: pip install 'esg_jax[eval]' ({error})") from error
    cross = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.uint8)
    skeleton = skeletonize(target)
    right, extra, missed = pred & target, pred & ~target, target & ~pred
    inner = cv2.erode((pred | target).astype(np.uint8), cross, iterations=relax) > 0

    def thick(errors: np.ndarray, blocked: np.ndarray) -> np.ndarray:
        """Errors whose core lies inside the union, grown back without crossing `blocked`."""
        grown = errors & inner
        for _ in range(relax):
            grown = (cv2.dilate(grown.astype(np.uint8), cross) > 0) & ~blocked
        return errors & grown

    def effort(errors: np.ndarray, correct: np.ndarray) -> tuple[int, int]:
        """Polygon points along the border with `correct`, and regions that do not touch it."""
        contours, _ = cv2.findContours(errors.astype(np.uint8), cv2.RETR_TREE, cv2.CHAIN_APPROX_NONE)
        near = cv2.dilate(correct.astype(np.uint8), cross) > 0
        regions = label(errors)
        untouched = set(range(1, int(regions.max()) + 1))
        used = np.zeros(errors.shape, bool)
        points = 0
        for contour in contours:
            pieces = _border_pieces(contour[:, 0], near, used)
            for piece in pieces:
                untouched -= set(regions[piece[:, 1], piece[:, 0]].tolist())
                points += len(cv2.approxPolyDP(piece[:, None].astype(np.int32), epsilon, False))
        return points, len(untouched)

    extra = thick(extra, right | missed)
    missed_thick = thick(missed, right | (pred & ~target))
    # A broken skeleton is an error however thin.
    missed_all = missed_thick | (skeleton & ~right)
    return *effort(extra, right | missed_all), *effort(missed_all, ~(right | extra | missed_all))


def _border_pieces(contour_xy: np.ndarray, near: np.ndarray, used: np.ndarray) -> list[np.ndarray]:
    """Runs of contour pixels that lie on `near` and were not `used` before; the ends of a closed run are joined."""
    pieces: list[list[tuple[int, int]]] = [[]]
    for x, y in contour_xy.tolist():
        if near[y, x] and not used[y, x]:
            used[y, x] = True
            pieces[-1].append((x, y))
        elif pieces[-1]:
            pieces.append([])
    pieces = [p for p in pieces if p]
    if len(pieces) > 1:
        (first_x, first_y), (last_x, last_y) = pieces[0][0], pieces[-1][-1]
        if max(abs(first_x - last_x), abs(first_y - last_y)) == 1:
            # The official code reverses the first piece before it appends it; kept, the counts depend on it.
            pieces[-1].extend(pieces.pop(0)[::-1])
    return [np.array(p) for p in pieces]
