"""Pictures in rows and columns with titles, and predictions beside ground truth."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageDraw

from esg_jax.masks import BACKGROUND
from esg_jax.viz.overlay import overlay
from esg_jax.viz.palette import assign_colors
from esg_jax.viz.text import fit_text, font

_INK, _FAINT, _PAPER = (25, 25, 30), (110, 110, 120), (255, 255, 255)


def image_grid(
    cells: Sequence[Sequence[UInt8[np.ndarray, "h w 3"] | None]],
    *,
    column_titles: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    cell_width: int = 560,
    gap: int = 14,
) -> UInt8[np.ndarray, "height width 3"]:
    """Rows of images on white, each scaled to the width of its column.

    Args:
        cells: rows of RGB images of any size; None leaves a place empty. Rows may differ in height.
        column_titles: one per column, above the first row.
        captions: one per cell, below it.
        cell_width, gap: pixels.

    Raises:
        ValueError: no cells, or titles or captions that do not fit their number.
    """
    if not cells or not cells[0] or len({len(row) for row in cells}) != 1:
        raise ValueError("image_grid needs rows of equal, positive length")
    columns = len(cells[0])
    if len(column_titles) not in (0, columns):
        raise ValueError(f"{len(column_titles)} column titles for {columns} columns")
    if captions and [len(row) for row in captions] != [columns] * len(cells):
        raise ValueError("captions need one text for every cell")
    scaled = [[_to_width(cell, cell_width) for cell in row] for row in cells]
    heights = [max((cell.height for cell in row if cell is not None), default=cell_width // 2) for row in scaled]
    title_size, caption_size = round(cell_width / 26), round(cell_width / 32)
    head = 2 * title_size if column_titles else gap
    foot = round(1.9 * caption_size) if captions else 0
    width = columns * cell_width + (columns + 1) * gap
    page = Image.new("RGB", (width, head + sum(heights) + len(cells) * (foot + gap)), _PAPER)
    draw = ImageDraw.Draw(page)
    for column, title in enumerate(column_titles):
        x = gap + column * (cell_width + gap)
        draw.text((x, head / 2), fit_text(title, title_size, cell_width), _INK, font(title_size), anchor="lm")
    y = head
    for index, row in enumerate(scaled):
        for column, cell in enumerate(row):
            x = gap + column * (cell_width + gap)
            if cell is not None:
                page.paste(cell, (x, y))
            if captions:
                text = fit_text(captions[index][column], caption_size, cell_width)
                draw.text((x, y + heights[index] + foot / 2), text, _FAINT, font(caption_size), anchor="lm")
        y += heights[index] + foot + gap
    return np.asarray(page)


def _to_width(cell, width):
    if cell is None:
        return None
    image = Image.fromarray(cell)
    height = max(1, min(3 * width, round(image.height * width / image.width)))
    filter = Image.Resampling.LANCZOS if image.width > width else Image.Resampling.BICUBIC
    return image.resize((width, height), filter)


@dataclasses.dataclass(frozen=True)
class GridRow:
    """One image of `prediction_grid`.

    Attributes:
        image: RGB.
        prediction: label map, k + 1 where entity k is, 0 where none is (`MaskSet.label_map`).
        target: label map of the ground truth, or None.
        title: what the picture is, e.g. the file name.
        scores: confidence of every predicted entity, or None.
    """

    image: UInt8[np.ndarray, "h w 3"]
    prediction: Int[np.ndarray, "h w"]
    target: Int[np.ndarray, "h w"] | None = None
    title: str = ""
    scores: Sequence[float] | None = None


def prediction_grid(rows: Iterable[GridRow], *, cell_width: int = 560) -> UInt8[np.ndarray, "height width 3"]:
    """Photograph, ground truth and prediction of every row, side by side.

    A predicted entity has the colour of the annotated one it overlaps with an IoU of at least 0.5. The caption counts
    how many annotated entities were found so.

    Raises:
        ValueError: no rows.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("prediction_grid needs at least one row")
    with_target = any(row.target is not None for row in rows)
    cells, captions = [], []
    for row in rows:
        count = int(row.prediction.max(initial=BACKGROUND))
        height, width = row.prediction.shape
        side = round(cell_width * max(1.0, height / width))  # drawn at the size shown: lines and tags stay readable
        tags = None if row.scores is None else [f"{score:.2f}" for score in row.scores]
        colors, found = None, ""
        target, annotated = None, ""
        if row.target is not None:
            total = int(row.target.max(initial=BACKGROUND))
            target_colors = assign_colors(row.target, total)
            target = overlay(row.image, row.target, colors=target_colors, max_side=side)
            pairs = matches(row.prediction, row.target)
            fixed = {found: int(target_colors[match]) for found, match in pairs.items()}
            colors = assign_colors(row.prediction, count, fixed)
            present = np.unique(row.target[row.target != BACKGROUND]).size
            found = f"{len(set(pairs.values()))} of {present} found at IoU 0.5, "
            annotated = f"{present} annotated"
        predicted = np.unique(row.prediction[row.prediction != BACKGROUND]).size
        picture = overlay(row.image, row.prediction, tags, colors=colors, max_side=side)
        if with_target:
            cells.append([row.image, target, picture])
            captions.append([row.title, annotated, f"{found}{predicted} predicted"])
        else:
            cells.append([row.image, picture])
            captions.append([row.title, f"{predicted} predicted"])
    titles = ["image", "ground truth", "prediction"] if with_target else ["image", "prediction"]
    return image_grid(cells, column_titles=titles, captions=captions, cell_width=cell_width)


def matches(
    prediction: Int[np.ndarray, "h w"], target: Int[np.ndarray, "h w"], least_iou: float = 0.5
) -> dict[int, int]:
    """Predicted entity -> annotated entity, both counted from 0, for pairs with an IoU of at least `least_iou`."""
    count, total = (int(labels.max(initial=BACKGROUND)) + 1 for labels in (prediction, target))
    joint = np.bincount(prediction.ravel().astype(np.int64) * total + target.ravel(), minlength=count * total)
    joint = joint.reshape(count, total)
    union = joint.sum(1, keepdims=True) + joint.sum(0, keepdims=True) - joint
    iou = (joint / np.maximum(union, 1))[1:, 1:]
    return {int(found): int(match) for found, match in zip(*np.nonzero(iou >= least_iou), strict=True)}
