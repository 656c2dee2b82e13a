"""Boundary IoU (Cheng et al., CVPR 2021), fast enough for full-resolution masks.

The boundary of a mask is what d erosions with a 3x3 square remove, the outside of the image counting as background;
d = max(1, round(ratio x image diagonal)). The official code erodes full-size arrays d times and re-encodes them. Here
all d erosions are a few passes over a bit-packed crop, and only pairs whose mask IoU could still match are looked
at.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float, UInt8

from esg_jax.masks import rle
from esg_jax.masks.rle import RLE


def boundary_width(size: Sequence[int], ratio: float = 0.02) -> int:
    """Erosions d for an image of `size` (height, width)."""
    return max(1, int(round(ratio * float(np.sqrt(size[0] ** 2 + size[1] ** 2)))))


def erode(mask: Bool[np.ndarray, "h w"], steps: int) -> Bool[np.ndarray, "h w"]:
    """`mask` after `steps` erosions with a 3x3 square; outside the array is background."""
    bits = _erode_packed(np.packbits(mask, axis=1), steps)
    return np.unpackbits(bits, axis=1, count=mask.shape[1]).astype(bool)


def _erode_packed(bits: UInt8[np.ndarray, "n b"], steps: int) -> UInt8[np.ndarray, "n b"]:
    """Erosion of rows of packed bits (first pixel = highest bit), along both axes."""
    return _window_and(_window_and(bits, steps, _shift_rows), steps, _shift_bits)


def _window_and(bits: np.ndarray, steps: int, shift: Callable[[np.ndarray, int], np.ndarray]) -> np.ndarray:
    """AND of every pixel with `steps` neighbours on both sides along the axis of `shift`."""
    window, covered = 2 * steps + 1, 1
    # Doubling: a window of 2k pixels is the AND of two windows of k pixels.
    while covered < window:
        step = min(covered, window - covered)
        bits = bits & shift(bits, step)
        covered += step
    return shift(bits, -steps)  # the windows so far begin at their pixel; centre them


def _shift_rows(bits: np.ndarray, step: int) -> np.ndarray:
    """Row i becomes row i + step; zeros come in."""
    out = np.zeros_like(bits)
    if step >= 0:
        out[: max(0, len(bits) - step)] = bits[step:]
    else:
        out[-step:] = bits[:step]
    return out


def _shift_bits(bits: np.ndarray, step: int) -> np.ndarray:
    """Pixel i of every row becomes pixel i + step; zeros come in."""
    whole, part = divmod(abs(step), 8)
    width = bits.shape[1]
    out = np.zeros_like(bits)
    if whole >= width:
        return out
    if step >= 0:
        out[:, : width - whole] = bits[:, whole:] << part
        if part:
            out[:, : width - whole - 1] |= bits[:, whole + 1 :] >> (8 - part)
    else:
        out[:, whole:] = bits[:, : width - whole] >> part
        if part:
            out[:, whole + 1 :] |= bits[:, : width - whole - 1] << (8 - part)
    return out


class _Boundary:
    """Bit-packed boundary of a mask within its bounding box."""

    def __init__(self, mask: RLE, steps: int) -> None:
        x, y, width, height = (int(v) for v in rle.boxes([mask])[0])
        # Packed along the height from a multiple of 8, so that two crops can be laid over each other bytewise.
        self.left, self.top = x, y // 8 * 8
        crop = rle.decode(mask).T[x : x + width, self.top : y + height]  # decoded masks are column-major
        bits = np.packbits(crop, axis=1)
        self.bits = bits & ~_erode_packed(bits, steps)
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
