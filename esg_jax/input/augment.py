"""Random windows and colours for training."""

import numpy as np
from jaxtyping import Float, Shaped, UInt8
from PIL import Image

# Gray value around a picture that has shrunk.
SURROUND = 128
_LUMA = np.array([0.299, 0.587, 0.114])


def random_colour_matrix(rng: np.random.Generator, strength: float) -> Float[np.ndarray, "3 4"]:
    """Brightness, contrast, saturation and hue of SSD (Liu et al. 2016), as one affine map of RGB 0..255.

    At strength 1: up to 32 brighter or darker, contrast and saturation 0.5 to 1.5, hue turned by up to 36 degrees, each
    in half of the draws, contrast before or after the other two. Smaller strengths shrink the ranges in proportion.
    Hue turns around the gray axis, which keeps the map affine; values are clipped once, at the end.
    """
    chosen = rng.random(5) < 0.5
    draws = rng.uniform(-1, 1, 4) * strength * chosen[:4]
    brightness, contrast = 32 * draws[0], np.eye(3) * (1 + 0.5 * draws[1])
    gray = np.tile(_LUMA, (3, 1))
    saturation = gray + (np.eye(3) - gray) * (1 + 0.5 * draws[2])
    colour = _turn(np.deg2rad(36 * draws[3])) @ saturation
    matrix = colour @ contrast if chosen[4] else contrast @ colour
    # Colour keeps gray, so brightness passes through it unchanged; contrast scales it.
    return np.concatenate([matrix, np.full((3, 1), brightness) * contrast[0, 0]], axis=1)


def _turn(angle: float) -> Float[np.ndarray, "3 3"]:
    """Rotation around (1, 1, 1)."""
    c, s = np.cos(angle), np.sin(angle)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    return c * np.eye(3) + s * cross + (1 - c) / 3


def change_colour(
    image_hw3: UInt8[np.ndarray, "h w 3"], matrix: Float[np.ndarray, "3 4"]
) -> UInt8[np.ndarray, "h w 3"]:
    """Pixels under an affine map of RGB 0..255, rounded and clipped."""
    values = tuple(float(value) for value in matrix.ravel())
    return np.asarray(Image.fromarray(np.ascontiguousarray(image_hw3)).convert("RGB", values))


def random_window(
    rng: np.random.Generator, height: int, width: int, zoom: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Box (x0, y0, x1, y1) of the picture's aspect whose sides are the picture's divided by a magnification.

    The magnification is log-uniform in `zoom`. Above 1 the box lies somewhere in the picture, below 1 the picture lies
    somewhere in the box.
    """
    factor = np.exp(rng.uniform(np.log(zoom[0]), np.log(zoom[1])))
    sides = [max(int(round(side / factor)), 1) for side in (width, height)]
    x, y = (int(round(rng.random() * (old - new))) for old, new in zip((width, height), sides, strict=True))
    return x, y, x + sides[0], y + sides[1]


def window(
    picture_hw: Shaped[np.ndarray, "h w *c"], box: tuple[int, int, int, int], fill: int
) -> Shaped[np.ndarray, "height width *c"]:
    """The box (x0, y0, x1, y1) of a picture; `fill` where it reaches beyond."""
    x0, y0, x1, y1 = box
    height, width = picture_hw.shape[:2]
    inside = picture_hw[max(y0, 0) : y1, max(x0, 0) : x1]
    if inside.shape[:2] == (y1 - y0, x1 - x0):
        return inside
    # Decoded label maps lie in memory by column.
    order = "F" if picture_hw.flags.f_contiguous else "C"
    out = np.full((y1 - y0, x1 - x0, *picture_hw.shape[2:]), fill, picture_hw.dtype, order)
    top, left = max(-y0, 0), max(-x0, 0)
    out[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    return out
