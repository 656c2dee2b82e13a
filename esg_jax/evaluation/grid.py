"""Pictures of predictions beside the ground truth."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageDraw

from esg_jax.viz.overlay import overlay
from esg_jax.viz.palette import assign_colors
from esg_jax.viz.text import fit_text, font

COLUMNS = ("image", "prediction", "ground truth")
_GAP = 8


def matched_colors(
    pred: Int[np.ndarray, "h w"], target: Int[np.ndarray, "h w"]
) -> tuple[Int[np.ndarray, "p"], Int[np.ndarray, "t"]]:
    """Palette indices for two label maps (-1 = nothing): a prediction with IoU >= 0.5 has its target's colour."""
    num_preds, num_targets = int(pred.max(initial=-1)) + 1, int(target.max(initial=-1)) + 1
    target_colors = assign_colors(target, num_targets)
    shared = np.zeros((num_preds + 1, num_targets + 1), np.int64)
    np.add.at(shared, (pred.ravel(), target.ravel()), 1)  # -1 is the last row and column
    union = shared.sum(1, keepdims=True) + shared.sum(0, keepdims=True) - shared
    overlap = (shared / np.maximum(union, 1))[:-1, :-1]
    fixed = {int(p): int(target_colors[t]) for p, t in np.argwhere(overlap >= 0.5)}
    return assign_colors(pred, num_preds, fixed=fixed), target_colors


def grid(
    rows: Iterable[tuple[str, UInt8[np.ndarray, "h w 3"], Int[np.ndarray, "h w"], Int[np.ndarray, "h w"]]],
    *,
    width: int = 420,
) -> UInt8[np.ndarray, "height width 3"]:
    """One row per image: photograph, prediction, ground truth; same colour = matched with IoU >= 0.5.

    Args:
        rows: (caption, RGB image, predicted label map, ground-truth label map), labels 0..n-1, -1 = nothing.
        width: of a column, in pixels.

    Raises:
        ValueError: no rows.
    """
    strips = []
    for caption, image, pred, target in rows:
        pred_colors, target_colors = matched_colors(pred, target)
        panels = [image, overlay(image, pred, colors=pred_colors), overlay(image, target, colors=target_colors)]
        scale = min(width / image.shape[1], 0.9 * width / image.shape[0])  # tall pictures do not fill the page
        size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
        strip = Image.new("RGB", (3 * width + 2 * _GAP, size[1] + 22), "white")
        for k, panel in enumerate(panels):
            place = k * (width + _GAP) + (width - size[0]) // 2, 22
            strip.paste(Image.fromarray(panel).resize(size, Image.Resampling.LANCZOS), place)
        ImageDraw.Draw(strip).text((2, 4), fit_text(caption, 13, strip.width - 4), fill="black", font=font(13))
        strips.append(strip)
    if not strips:
        raise ValueError("no images to draw")
    out = Image.new("RGB", (strips[0].width, 26 + sum(s.height + _GAP for s in strips)), "white")
    for k, title in enumerate(COLUMNS):
        ImageDraw.Draw(out).text((k * (width + _GAP) + width / 2, 13), title, fill="black", font=font(15), anchor="mm")
    y = 26
    for strip in strips:
        out.paste(strip, (0, y))
        y += strip.height + _GAP
    return np.asarray(out)
