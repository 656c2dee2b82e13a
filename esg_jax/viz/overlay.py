"""A label map drawn over its photograph."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image
from scipy import ndimage

from esg_jax.masks import BACKGROUND
from esg_jax.viz.palette import assign_colors, palette
from esg_jax.viz.text import draw_tag, tag_box, text_size


def overlay(
    image_hw3: UInt8[np.ndarray, "h w 3"],
    label_map: Int[np.ndarray, "h w"],
    tags: Sequence[str] | None = None,
    *,
    colors: Int[np.ndarray, "n"] | None = None,
    opacity: float = 0.5,
    max_side: int = 1600,
) -> UInt8[np.ndarray, "height width 3"]:
    """Tints every entity, outlines it thinly, and writes its tag where the entity is widest.

    Tags that do not fit into their entity or would cover another tag are left out.

    Args:
        image_hw3: RGB.
        label_map: k + 1 where entity k is, 0 where none is.
        tags: one short text per entity.
        colors: index into `palette` per entity; by default chosen so that neighbours contrast.
        opacity: of the tint.
        max_side: larger images are drawn at this size, in pixels; those below half of it at up to twice their own.

    Raises:
        ValueError: image and label map differ in size, or there are fewer tags or colours than entities.
    """
    if image_hw3.shape[:2] != label_map.shape:
        raise ValueError(f"image {image_hw3.shape[:2]} and label map {label_map.shape} differ in size")
    count = int(label_map.max(initial=BACKGROUND))
    for name, values in (("tags", tags), ("colors", colors)):
        if values is not None and len(values) < count:
            raise ValueError(f"{len(values)} {name} for {count} entities")
    if colors is None:
        colors = assign_colors(label_map, count)
    image_hw3, label_map = _rescale(image_hw3, label_map, max_side)
    picture = image_hw3.astype(np.float32)
    tint = palette()[np.append(0, colors)[label_map]] if count else picture
    inside = (label_map != BACKGROUND)[..., None]
    # What no entity owns loses some of its colour.
    gray = picture.mean(-1, keepdims=True)
    picture = np.where(inside, (1 - opacity) * picture + opacity * tint, 0.55 * picture + 0.45 * gray)
    edge = outline(label_map, width=max(1, round(max(label_map.shape) / 900)))[..., None]
    picture = np.where(edge, 0.15 * picture + 0.85 * 255, picture)
    canvas = Image.fromarray(np.round(picture).clip(0, 255).astype(np.uint8))
    if tags is not None:
        _draw_tags(canvas, label_map, tags)
    return np.asarray(canvas)


def outline(label_map: Int[np.ndarray, "h w"], width: int = 1) -> Bool[np.ndarray, "h w"]:
    """Pixels on the border between two labels, a line of about `width` pixels."""
    edge = np.zeros(label_map.shape, bool)
    edge[1:] |= label_map[1:] != label_map[:-1]
    edge[:, 1:] |= label_map[:, 1:] != label_map[:, :-1]
    if width > 1:
        edge = ndimage.binary_dilation(edge, np.ones((width, width), bool))
    return edge


def _rescale(image_hw3, label_map, max_side):
    height, width = label_map.shape
    longest = max(height, width)
    scale = max_side / longest if longest > max_side else min(2.0, max(1.0, 0.5 * max_side / longest))
    if scale == 1:
        return image_hw3, label_map
    size = max(1, round(height * scale)), max(1, round(width * scale))
    filter = Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(image_hw3).resize(size[::-1], filter)), resize_labels(label_map, size)


def resize_labels(label_map: Int[np.ndarray, "h w"], size: tuple[int, int]) -> Int[np.ndarray, "height width"]:
    """Nearest-neighbour copy of (height, width) `size`."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(size, label_map.shape, strict=True)
    )
    return label_map[rows][:, columns]


def _draw_tags(canvas: Image.Image, label_map: np.ndarray, tags: Sequence[str]) -> None:
    size = max(11, round(max(label_map.shape) / 85))
    taken = np.zeros(label_map.shape, bool)
    boxes = ndimage.find_objects(label_map)
    areas = np.bincount(label_map.ravel(), minlength=len(boxes) + 1)[1:]
    for row in np.argsort(-areas, kind="stable"):
        if not areas[row] or not tags[row]:
            continue
        rows, columns = boxes[row]
        # Distance to the border, the picture's own border included.
        room = ndimage.distance_transform_edt(np.pad(label_map[rows, columns] == row + 1, 1))[1:-1, 1:-1]
        y, x = np.unravel_index(room.argmax(), room.shape)
        width, height = text_size(tags[row], size)
        if room[y, x] < 0.4 * max(height, 0.6 * width):
            continue
        center = (columns.start + x + 0.5, rows.start + y + 0.5)
        x0, y0, x1, y1 = tag_box(center, tags[row], size, canvas.size)
        if taken[y0:y1, x0:x1].any():
            continue
        taken[y0:y1, x0:x1] = True
        draw_tag(canvas, center, tags[row], size)
