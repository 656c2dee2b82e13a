"""Pictures in rows and columns with titles, and predictions beside ground truth."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

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
    """Photograph, ground truth and prediction of every row, side by side; see `comparison_grid`."""
    return comparison_grid({"prediction": rows}, cell_width=cell_width)


def comparison_grid(
    runs: Mapping[str, Iterable[GridRow]], *, cell_width: int = 560
) -> UInt8[np.ndarray, "height width 3"]:
    """Photograph, ground truth and the predictions of several models for the same images, side by side.

    A predicted entity has the colour of the annotated one it overlaps with an IoU of at least 0.5. The caption counts
    how many annotated entities were found so.

    Args:
        runs: title of the column -> rows. Photograph, ground truth and title are those of the first run.
        cell_width: pixels.

    Raises:
        ValueError: no rows, or runs of different length.
    """
    columns = [list(rows) for rows in runs.values()]
    if not columns or not columns[0]:
        raise ValueError("a grid needs at least one row")
    if len({len(rows) for rows in columns}) != 1:
        raise ValueError(f"the runs have different numbers of rows: {[len(rows) for rows in columns]}")
    with_target = any(row.target is not None for row in columns[0])
    cells, captions = [], []
    for first, *others in zip(*columns, strict=True):
        target_colors = None
        cells.append([first.image])
        captions.append([first.title])
        if first.target is not None:
            target_colors = assign_colors(first.target, int(first.target.max(initial=BACKGROUND)))
            side = _side(first.target, cell_width)
            cells[-1].append(overlay(first.image, first.target, colors=target_colors, max_side=side))
            captions[-1].append(f"{_count(first.target)} annotated")
        elif with_target:
            cells[-1].append(None)
            captions[-1].append("")
        for row in (first, *others):
            picture, caption = _prediction_cell(row, first.target, target_colors, cell_width)
            cells[-1].append(picture)
            captions[-1].append(caption)
    titles = ["image", "ground truth", *runs] if with_target else ["image", *runs]
    return image_grid(cells, column_titles=titles, captions=captions, cell_width=cell_width)


def _prediction_cell(row, target, target_colors, cell_width) -> tuple[UInt8[np.ndarray, "h w 3"], str]:
    """Picture and caption of a prediction, in the colours of the annotated entities it found."""
    tags = None if row.scores is None else [f"{score:.2f}" for score in row.scores]
    colors, caption = None, f"{_count(row.prediction)} predicted"
    if target is not None:
        pairs = matches(row.prediction, target)
        fixed = {found: int(target_colors[match]) for found, match in pairs.items()}
        colors = assign_colors(row.prediction, int(row.prediction.max(initial=BACKGROUND)), fixed)
        caption = f"{len(set(pairs.values()))} of {_count(target)} found at IoU 0.5, {caption}"
    side = _side(row.prediction, cell_width)
    return overlay(row.image, row.prediction, tags, colors=colors, max_side=side), caption


def _count(label_map) -> int:
    """Entities with at least one pixel."""
    return np.unique(label_map[label_map != BACKGROUND]).size


def _side(label_map, cell_width) -> int:
    """Long side of a picture drawn at the size shown, so that lines and tags stay readable."""
    height, width = label_map.shape
    return round(cell_width * max(1.0, height / width))


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
