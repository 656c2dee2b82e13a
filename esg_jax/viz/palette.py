"""Colours that tell neighbouring entities apart."""

import functools

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

# Hues in degrees, and (lightness, chroma) pairs of OKLCH, all inside sRGB.
_HUES = (25, 55, 85, 125, 155, 195, 230, 260, 295, 335)
_TONES = ((0.72, 0.16), (0.55, 0.15), (0.86, 0.10))


@functools.cache
def palette() -> UInt8[np.ndarray, "n 3"]:
    """Thirty RGB colours, bright ones first."""
    lab = _palette_lab()
    return np.round(_oklab_to_srgb(lab) * 255).astype(np.uint8)


@functools.cache
def _palette_lab() -> Float[np.ndarray, "n 3"]:
    rows = []
    for shift, (lightness, chroma) in zip((0, 15, 8), _TONES, strict=True):
        hue = np.radians(np.array(_HUES) + shift)
        rows.append(np.stack([np.full_like(hue, lightness), chroma * np.cos(hue), chroma * np.sin(hue)], axis=1))
    return np.concatenate(rows)


def _oklab_to_srgb(lab: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
    """Björn Ottosson's OKLab to gamma-encoded sRGB in 0..1."""
    to_lms = np.array(
        [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
    )
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = np.clip((lab @ to_lms.T) ** 3 @ to_rgb.T, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def neighbours(label_map: Int[np.ndarray, "h w"], count: int, side: int = 320) -> Bool[np.ndarray, "count count"]:
    """Which of the entities (labels 1..count) touch or nearly touch, judged on a copy of at most `side` pixels."""
    step = max(1, -(-max(label_map.shape) // side))
    small = label_map[::step, ::step]
    touching = np.zeros((count + 1, count + 1), bool)  # the first row and column: background
    for distance in (1, 2, 3):
        for first, second in (
            (small[distance:], small[:-distance]),
            (small[:, distance:], small[:, :-distance]),
        ):
            touching[first.ravel(), second.ravel()] = True
    touching |= touching.T
    np.fill_diagonal(touching, False)
    return touching[1:, 1:]


def assign_colors(
    label_map: Int[np.ndarray, "h w"], count: int, fixed: dict[int, int] | None = None
) -> Int[np.ndarray, "count"]:
    """Index into `palette` for each entity, neighbours far apart.

    Greedy from the largest entity down: the colour farthest from those of its neighbours; among nearly as good ones,
    the one used least so far.

    Args:
        label_map: k + 1 where entity k is, 0 where none is.
        count: number of entities.
        fixed: colours decided elsewhere, entity -> index.
    """
    lab = _palette_lab()
    distance = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    touching = neighbours(label_map, count)
    areas = np.bincount(label_map.ravel(), minlength=count + 1)[1:]
    chosen = np.full(count, -1)
    used = np.zeros(len(lab), int)
    for row, color in (fixed or {}).items():
        chosen[row] = color
        used[color] += 1
    for row in np.argsort(-areas, kind="stable"):
        if chosen[row] >= 0:
            continue
        around = chosen[touching[row]]
        around = around[around >= 0]
        room = distance[:, around].min(axis=1) if around.size else np.full(len(lab), np.inf)
        good = room >= min(0.8 * room.max(), 0.2)
        chosen[row] = min(np.flatnonzero(good), key=lambda color: (used[color], color))
        used[chosen[row]] += 1
    return chosen
