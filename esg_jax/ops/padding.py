"""Which pixel goes where when a picture is resized and padded to a square. Plain arithmetic, numpy and jax alike."""

from typing import Any

import numpy as np
from jaxtyping import Int

PAD_POSITIONS = ("bottom_right", "center")


def check_pad_position(value: str, name: str) -> None:
    """Raises ValueError, naming the field, when there is no such position."""
    if value not in PAD_POSITIONS:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(PAD_POSITIONS)}")


def nearest_index(size: int, new_size: int) -> Int[np.ndarray, "new_size"]:
    """Source index of every output pixel, half-pixel centres: floor((i + 0.5) * size / new_size)."""
    return (2 * np.arange(new_size) + 1) * size // (2 * new_size)


def content_start(size: Any, side: int, pad_position: str) -> Any:
    """First row (or column) of content of `size` rows (columns) in a square.

    "bottom_right" pads behind the content, "center" on both sides of it, an odd rest behind it. The start follows from
    the size alone, so that batches carry sizes only.
    """
    return (side - size) // 2 if pad_position == "center" else size * 0


def content_mask(height: int, width: int, size_b2: Any, pad_position: str) -> Any:
    """Which pixels of padded pictures are content: bool (b, height, width).

    Args:
        height, width: of the padded picture.
        size_b2: (height, width) of the content of every picture.
        pad_position: one of `PAD_POSITIONS`.
    """

    def along(side, size_b):
        # numpy on the left: its result is whatever kind of array the sizes are.
        place = np.arange(side, dtype=np.int32) - content_start(size_b, side, pad_position)[:, None]
        return (place >= 0) & (place < size_b[:, None])

    return along(height, size_b2[:, 0])[:, :, None] & along(width, size_b2[:, 1])[:, None, :]
