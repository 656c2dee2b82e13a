"""GELLA's geometry: picture and label map in squares, placed alike, so that a point has the same place in both."""

import functools

import numpy as np
from jaxtyping import Int, Int32, Integer, UInt8
from PIL import Image

from esg_jax.input.records import Entities
from esg_jax.ops.padding import content_start, nearest_index


def content_size(height: int, width: int, side: int) -> tuple[int, int]:
    """(height, width) after scaling the longer side to `side`."""
    scale = side / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def content_slices(size: tuple[int, int], side: int, pad_position: str) -> tuple[slice, slice]:
    """Rows and columns of content of (height, width) `size` in the square, see `ops.padding.content_start`."""
    top, left = (content_start(length, side, pad_position) for length in size)
    return slice(top, top + size[0]), slice(left, left + size[1])


def square_image(
    image_hw3: UInt8[np.ndarray, "h w 3"], side: int, pad_position: str = "bottom_right"
) -> tuple[UInt8[np.ndarray, "side side 3"], Int32[np.ndarray, "2"]]:
    """The picture at its longer side `side` (bicubic) in a black square, and its (height, width)."""
    size = content_size(*image_hw3.shape[:2], side)
    out = np.zeros((side, side, 3), np.uint8)
    resized = Image.fromarray(np.ascontiguousarray(image_hw3)).resize(size[::-1], Image.Resampling.BICUBIC)
    out[content_slices(size, side, pad_position)] = np.asarray(resized)
    return out, np.array(size, np.int32)


def square_labels(
    labels_hw: Integer[np.ndarray, "h w"], side: int, pad_position: str = "bottom_right"
) -> tuple[Integer[np.ndarray, "side side"], Int32[np.ndarray, "2"]]:
    """A label map in the geometry of `square_image`, nearest neighbour, padded with 0, and its (height, width)."""
    size = content_size(*labels_hw.shape, side)
    rows, columns = nearest_index(labels_hw.shape[0], size[0]), nearest_index(labels_hw.shape[1], size[1])
    out = np.zeros((side, side), labels_hw.dtype)
    out[content_slices(size, side, pad_position)] = labels_hw[rows[:, None], columns]
    return out, np.array(size, np.int32)


def entity_map(
    entities: Entities, side: int, max_entities: int, pad_position: str = "bottom_right"
) -> tuple[np.ndarray, Int32[np.ndarray, "2"], Int[np.ndarray, "n"]]:
    """The label map of the network from annotated entities; of overlapping ones the smaller is on top.

    Crowd regions are left out. Of more than `max_entities`, the largest at the original resolution are kept, in
    annotation order.

    Returns:
        label_map int16 (side, side), 0 for nothing; its content's (height, width); the slot of every entity (label
        minus 1), -1 for those left out and those of which no pixel is left.
    """
    areas = entities.areas
    kept = np.flatnonzero(~entities.crowd & (areas > 0))
    if len(kept) > max_entities:
        kept = np.sort(kept[np.argsort(-areas[kept], kind="stable")[:max_entities]])
    # Rank by area, the largest lowest, so that a maximum over the layers lets the smaller entity win.
    ranks = np.zeros(len(areas) + 1, np.int32)
    by_area = kept[np.argsort(-areas[kept], kind="stable")]
    ranks[by_area + 1] = np.arange(1, len(kept) + 1)
    resized = [square_labels(layer, side, pad_position) for layer in entities.layers]
    painted = functools.reduce(np.maximum, (ranks[labels] for labels, _ in resized))
    slot_of_rank = np.zeros(len(kept) + 1, np.int16)
    slot_of_rank[1:] = np.searchsorted(kept, by_area) + 1
    label_map = slot_of_rank[painted]
    visible = np.bincount(label_map.ravel(), minlength=len(kept) + 1)[1:] > 0
    slots = np.full(len(areas), -1)
    slots[kept[visible]] = np.flatnonzero(visible)
    return label_map, resized[0][1], slots
