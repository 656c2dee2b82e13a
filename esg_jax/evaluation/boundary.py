"""Boundary IoU (Cheng et al., CVPR 2021), fast enough for full-resolution masks.

The boundary of a mask is what d erosions with a 3x3 square remove, the outside of the image counting as background;
d = max(1, round(ratio x image diagonal)). The official code erodes full-size arrays d times and re-encodes them. Here
all d erosions are one pass per axis over a bit-packed crop, and only pairs whose mask IoU could still match are looked
at.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, UInt8

from esg_jax.evaluation import rle
from esg_jax.evaluation.rle import RLE


def boundary_width(size: Sequence[int], ratio: float = 0.02) -> int:
    """Erosions d for an image of `size` (height, width)."""
    return max(1, int(round(ratio * float(np.sqrt(size[0] ** 2 + size[1] ** 2)))))


def erode(mask: Bool[np.ndarray, "h w"], steps: int) -> Bool[np.ndarray, "h w"]:
    """`mask` after `steps` erosions with a 3x3 square; outside the array is background."""
    for _ in range(2):  # along the height, then, transposed, along the width, and back
        bits = _erode_rows(np.packbits(mask, axis=1), steps)
        mask = np.unpackbits(bits, axis=1, count=mask.shape[1]).astype(bool).T
    return mask


def _erode_rows(bits: UInt8[np.ndarray, "n b"], steps: int) -> UInt8[np.ndarray, "n b"]:
    """AND of every row with its `steps` neighbours on both sides; rows beyond the array are 0."""
    length = bits.shape[0]
    padded = np.zeros((length + 2 * steps, bits.shape[1]), np.uint8)
    padded[steps : steps + length] = bits
    window, covered = 2 * steps + 1, 1
    # Doubling: a window of 2k rows is the AND of two windows of k rows.
    while covered < window:
        shift = min(covered, window - covered)
        padded = padded[:-shift] & padded[shift:]
        covered += shift
    return padded


class _Boundary:
    """Bit-packed boundary of a mask within its bounding box."""

    def __init__(self, mask: RLE, steps: int) -> None:
        full = rle.decode(mask)
        columns = np.flatnonzero(full.any(0))
        rows = np.flatnonzero(full.any(1))
        # Packed along the height from a multiple of 8, so that two crops can be laid over each other bytewise.
        self.top = int(rows[0]) // 8 * 8
        self.left = int(columns[0])
        crop = full[self.top : int(rows[-1]) + 1, self.left : int(columns[-1]) + 1]
        self.bits = np.packbits((crop & ~erode(crop, steps)).T, axis=1)  # (width, height / 8)
        self.area = int(np.bitwise_count(self.bits).sum())

    def shared(self, other: "_Boundary") -> int:
        """Boundary pixels in common."""
        left = max(self.left, other.left)
        right = min(self.left + self.bits.shape[0], other.left + other.bits.shape[0])
        top = max(self.top, other.top) // 8
        bottom = min(self.top // 8 + self.bits.shape[1], other.top // 8 + other.bits.shape[1])
        if right <= left or bottom <= top:
            return 0
        a, b = (m.bits[left - m.left : right - m.left, top - m.top // 8 : bottom - m.top // 8] for m in (self, other))
        return int(np.bitwise_count(a & b).sum())


def boundary_area(mask: RLE, ratio: float = 0.02) -> int:
    """Number of boundary pixels of `mask`."""
    return _Boundary(mask, boundary_width(mask["size"], ratio)).area if rle.areas([mask])[0] else 0


def boundary_iou(
    pred: Sequence[RLE],
    target: Sequence[RLE],
    crowd: Bool[np.ndarray, "g"],
    mask_iou: Float[np.ndarray, "d g"],
    ratio: float = 0.02,
    at_least: float = 0.0,
) -> Float[np.ndarray, "d g"]:
    """min(mask IoU, boundary IoU) of every pair; crowd targets keep their mask overlap.

    Args:
        pred, target: RLEs of one image.
        crowd: which targets are crowd regions.
        mask_iou: the mask overlaps.
        ratio: boundary width over the image diagonal.
        at_least: pairs with a smaller mask IoU keep that value unrefined (they cannot reach any higher threshold).
    """
    out = mask_iou.copy()
    pairs = np.argwhere((mask_iou >= max(at_least, np.nextafter(0, 1))) & ~np.asarray(crowd, bool)[None, :])
    if not len(pairs):
        return out
    steps = boundary_width(target[0]["size"], ratio)
    preds = {d: _Boundary(pred[d], steps) for d in set(pairs[:, 0].tolist())}
    targets = {g: _Boundary(target[g], steps) for g in set(pairs[:, 1].tolist())}
    for d, g in pairs:
        shared = preds[d].shared(targets[g])
        union = preds[d].area + targets[g].area - shared
        out[d, g] = min(out[d, g], shared / union)
    return out
