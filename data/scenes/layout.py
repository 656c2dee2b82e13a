"""Where things are: background regions, then silhouettes in painting order, as one exact partition of the picture."""

import dataclasses
from collections.abc import Callable

import numpy as np
from PIL import Image

from data.scenes import shapes

# Fraction of its own silhouette that an entity must still show after occlusion.
MIN_VISIBLE = 0.2
# Typical share of its box that a silhouette fills; makes sampled areas come out as asked.
FILL = 0.55


@dataclasses.dataclass
class Item:
    """One entity: a background region (`mask` None) or a silhouette at `corner`.

    corner: (x, y) of the mask's top left pixel; may lie outside of the picture.
    mask: L image, 255 inside.
    depth: 0 near .. 1 far.
    group: entities of one group share their material.
    """

    corner: tuple[int, int] = (0, 0)
    mask: Image.Image | None = None
    depth: float = 1.0
    group: int = -1
    kind: str = "region"
    solid: bool = False


@dataclasses.dataclass
class Layout:
    """items[k] owns the pixels with label k + 1; background regions come first, later items occlude earlier ones."""

    labels: np.ndarray  # int16 (height, width)
    items: list[Item]
    style: str
    horizon: float  # row below which things stand, in pixels


def make_layout(
    rng: np.random.Generator, width: int, height: int, count_range: tuple[int, int], min_area: float
) -> Layout:
    """Draws the partition.

    Args:
        rng: of this scene.
        width, height: pixels.
        count_range: the number of entities is about log-uniform in it, before those too small are dropped.
        min_area: fraction of the picture that an entity must still show after occlusion.
    """
    style = str(rng.choice(list(STYLES), p=[0.3, 0.2, 0.2, 0.18, 0.12]))
    labels, regions, horizon = STYLES[style](rng, width, height)
    low, high = count_range
    # A few of the drawn items end up hidden.
    total = int(round(np.exp(rng.uniform(np.log(low), np.log(high + 1))) * 1.08))
    items = _items(rng, max(total - len(regions), 2), width, height, style, horizon)
    for _ in range(3):
        painted = _paint(labels, regions, items)
        keep = _visible_enough(painted, len(regions), items, min_area)
        if all(keep):
            break
        items = [item for item, kept in zip(items, keep, strict=True) if kept]
    painted = _paint(labels, regions, items)
    return _compact(Layout(painted, regions + items, style, horizon), min_area)


def _paint(background: np.ndarray, regions: list[Item], items: list[Item]) -> np.ndarray:
    labels = background.copy()
    for number, item in enumerate(items, start=len(regions) + 1):
        target, mask = clip(item, labels)
        target[mask] = number
    return labels


def clip(item: Item, picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The part of `picture` under the item's box, and the item's boolean mask there."""
    assert item.mask is not None
    x, y = item.corner
    width, height = item.mask.size
    x0, y0 = max(x, 0), max(y, 0)
    x1, y1 = max(min(x + width, picture.shape[1]), x0), max(min(y + height, picture.shape[0]), y0)
    mask = np.asarray(item.mask)[y0 - y : y1 - y, x0 - x : x1 - x] > 127
    return picture[y0:y1, x0:x1], mask


def _visible_enough(labels: np.ndarray, first: int, items: list[Item], min_area: float) -> list[bool]:
    visible = np.bincount(labels.ravel(), minlength=first + len(items) + 1)[first + 1 :]
    return [
        pixels >= min_area * labels.size and pixels >= MIN_VISIBLE * np.count_nonzero(clip(item, labels)[1])
        for item, pixels in zip(items, visible, strict=True)
    ]


def _compact(layout: Layout, min_area: float) -> Layout:
    """Drops background regions that nothing of is left to see, and renumbers."""
    counts = np.bincount(layout.labels.ravel(), minlength=len(layout.items) + 1)
    # Slivers of a covered region join the region that is painted first, keeping the partition exact.
    for number, item in enumerate(layout.items, start=1):
        if item.mask is None and 0 < counts[number] < min_area * layout.labels.size:
            largest = 1 + int(np.argmax([counts[k + 1] if i.mask is None else 0 for k, i in enumerate(layout.items)]))
            layout.labels[layout.labels == number] = largest
            counts[number] = 0
    kept = [k for k in range(len(layout.items)) if counts[k + 1]]
    table = np.zeros(len(layout.items) + 1, np.int16)
    table[np.array(kept) + 1] = np.arange(1, len(kept) + 1)
    return dataclasses.replace(layout, labels=table[layout.labels], items=[layout.items[k] for k in kept])


# Background regions: style -> function giving (labels, regions, horizon).


def _line(rng: np.random.Generator, length: int, slope: float, amplitude: float) -> np.ndarray:
    """Random curve over `length` pixels with a 1 / f^slope spectrum."""
    k = np.arange(1, 200)
    spectrum = np.zeros(length // 2 + 1, complex)
    count = min(len(k), length // 2)
    spectrum[1 : count + 1] = (rng.standard_normal(count) + 1j * rng.standard_normal(count)) / k[:count] ** slope
    curve = np.fft.irfft(spectrum, length)
    return curve / max(curve.std(), 1e-9) * amplitude


def _skyline(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    edges = np.sort(rng.integers(0, width, int(rng.integers(4, 18))))
    return (rng.uniform(0, 0.25, len(edges) + 1) * height)[np.searchsorted(edges, np.arange(width))]


def _outdoor(rng, width, height):
    rows = np.arange(height)[:, None]
    horizon = height * rng.uniform(0.2, 0.65)
    labels = np.ones((height, width), np.int16)
    depths = [1.0]
    for _ in range(int(rng.choice([0, 1, 1, 2]))):
        rise = {
            0: lambda: _line(rng, width, 1.8, height * 0.04),
            1: lambda: np.abs(_line(rng, width, 1.1, height * 0.05)),
            2: lambda: _skyline(rng, width, height),
        }[int(rng.integers(3))]()
        labels[rows > horizon - height * rng.uniform(0.0, 0.15) - rise] = len(depths) + 1
        depths.append(0.85)
    labels[rows > horizon + _line(rng, width, 1.8, height * rng.uniform(0.001, 0.015))] = len(depths) + 1
    depths.append(0.5)
    if rng.random() < 0.55:  # road, river or path towards the horizon
        t = np.clip((rows - horizon) / (height - horizon), 0, 1)
        vanish, foot = width * rng.uniform(0.1, 0.9), width * rng.uniform(-0.2, 1.2)
        bend = _line(rng, height, 2.2, width * 0.05)[:, None] * t
        half = width * rng.uniform(0.05, 0.4) * t + 2
        road = (np.abs(np.arange(width) - vanish - (foot - vanish) * t - bend) < half) & (rows > horizon + 2)
        labels[road & (labels == len(depths))] = len(depths) + 1
        depths.append(0.5)
    if rng.random() < 0.35:  # a nearer ground, for example a kerb or a lawn
        edge = height * rng.uniform(0.75, 0.95) + _line(rng, width, 1.8, height * 0.02)
        labels[(rows > edge)] = len(depths) + 1
        depths.append(0.2)
    return labels, [Item(depth=depth) for depth in depths], horizon


def _room(rng, width, height):
    rows, columns = np.arange(height)[:, None], np.arange(width)[None]
    labels = np.ones((height, width), np.int16)
    floor = height * rng.uniform(0.45, 0.8)
    count = 1
    corner = width * rng.uniform(0.15, 0.85)
    slopes = rng.uniform(0.02, 0.35, 2)
    edge = floor + np.where(columns < corner, (corner - columns) * slopes[0], (columns - corner) * slopes[1])
    if rng.random() < 0.6:
        count += 1
        labels[:, int(corner) :] = count
    if rng.random() < 0.3:
        count += 1
        ceiling = height * rng.uniform(0.03, 0.15)
        labels[rows < ceiling - 0.5 * (edge - floor)] = count
    if rng.random() < 0.4:  # skirting board
        count += 1
        labels[(rows > edge - height * rng.uniform(0.01, 0.04))] = count
    count += 1
    labels[rows > edge] = count
    return labels, [Item(depth=0.6) for _ in range(count)], floor


def _table(rng, width, height):
    labels = np.ones((height, width), np.int16)
    regions = 1
    if rng.random() < 0.6:
        edge = height * rng.uniform(0.1, 0.5) + np.arange(width) * rng.uniform(-0.15, 0.15)
        labels[np.arange(height)[:, None] > edge] = 2
        regions = 2
    return labels, [Item(depth=0.3) for _ in range(regions)], 0.0


def _patches(rng, width, height):
    """Recursive cuts by winding lines: fields, facades, fabrics. Drawn at half resolution."""
    y, x = np.arange(0, height, 2, dtype=np.float32)[:, None], np.arange(0, width, 2, dtype=np.float32)[None]
    labels = np.ones((y.shape[0], x.shape[1]), np.int16)
    count = 1
    for _ in range(int(rng.integers(2, 6))):
        angle = rng.choice([0.0, np.pi / 2, rng.uniform(0, np.pi)]) + 0.1 * rng.standard_normal()
        c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        along = x * c + y * s
        curve = _line(rng, 4096, rng.uniform(1.2, 2.2), height * rng.uniform(0.0, 0.05)).astype(np.float32)
        cx, cy = rng.uniform(0.15, 0.85, 2) * (width, height)
        side = (y - cy) * c - (x - cx) * s > curve[np.clip(along + 1000, 0, 4095).astype(np.int16)]
        cut = int(rng.integers(1, count + 1))
        inside = (labels == cut) & side
        if 0.01 * labels.size < inside.sum() < 0.99 * (labels == cut).sum():
            count += 1
            labels[inside] = count
    labels = labels.repeat(2, axis=0).repeat(2, axis=1)[:height, :width]
    return labels, [Item(depth=0.4) for _ in range(count)], 0.0


def _shelf(rng, width, height):
    rows, columns = np.arange(height)[:, None], np.arange(width)[None]
    labels = np.ones((height, width), np.int16)
    levels, uprights = int(rng.integers(2, 5)), int(rng.integers(1, 4))
    thick = height * rng.uniform(0.01, 0.03)
    pitch_y, pitch_x = height / levels, width / uprights
    board = ((rows + thick) % pitch_y < thick) | (np.abs(columns % pitch_x - pitch_x / 2) < thick / 2)
    labels[board] = 2
    return labels, [Item(depth=0.6), Item(depth=0.5)], pitch_y


STYLES: dict[str, Callable] = {
    "outdoor": _outdoor,
    "room": _room,
    "table": _table,
    "patches": _patches,
    "shelf": _shelf,
}


# Silhouettes.


def _items(rng, count: int, width: int, height: int, style: str, horizon: float) -> list[Item]:
    placed: list[tuple[float, Item]] = []  # painting key, item
    thin = int(rng.choice([0, 1, 2, 3], p=[0.6, 0.25, 0.1, 0.05]))
    while len(placed) < count:
        remaining = count - len(placed)
        if thin and remaining > 2:
            thin -= 1
            placed.append((3 + rng.random(), _thin(rng, width, height)))
            continue
        area = np.exp(rng.uniform(np.log(0.0006), np.log(0.35)))
        if remaining >= 3 and area < 0.06 and rng.random() < 0.15:
            number = min(int(rng.integers(3, 10)), remaining)
            placed += _group(rng, number, area, width, height, style, horizon, group=len(placed))
        elif placed and area < 0.02 and rng.random() < 0.4:  # on something that is there already
            key, parent = placed[int(rng.integers(len(placed)))]
            item = _solid(rng, area, width, height, style)
            spot = rng.uniform(0.15, 0.85, 2) * parent.mask.size + parent.corner
            item.depth = parent.depth
            placed.append((key + 1e-3 * (1 + rng.random()), _centre(item, spot)))
        else:
            item = _solid(rng, area, width, height, style)
            spot = _spot(rng, item, area, width, height, style, horizon)
            placed.append((_key(rng, area, spot[1] + item.mask.size[1] / 2, height, style), _centre(item, spot)))
    return [item for _, item in sorted(placed, key=lambda pair: pair[0])]


def _key(rng, area: float, bottom: float, height: int, style: str) -> float:
    if style in ("outdoor", "room"):  # what stands lower is nearer
        return bottom / height + 0.1 * rng.standard_normal()
    return 0.25 * -np.log(area) / 3 + 0.4 * rng.standard_normal()


def _solid(rng, area: float, width: int, height: int, style: str, row=None) -> Item:
    # What is tiny shows little more than a spot.
    table = shapes.SIMPLE if area < 0.004 and rng.random() < 0.7 else shapes.SOLID
    function, _, (low, high) = row or shapes.choose(rng, table)
    aspect = np.exp(rng.uniform(np.log(low), np.log(high)))
    box = area * width * height / FILL
    size = (int(min(np.sqrt(box * aspect), 0.95 * width)), int(min(np.sqrt(box / aspect), 0.95 * height)))
    mask = function(rng, (max(size[0], 8), max(size[1], 8)))
    if rng.random() < 0.5:
        mask = mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    angle = rng.uniform(-180, 180) if style in ("table", "patches") and rng.random() < 0.7 else rng.normal(0, 4)
    if abs(angle) > 2 and max(mask.size) < 1200:
        mask = mask.rotate(angle, Image.Resampling.NEAREST, expand=True)
    return Item(mask=mask, depth=float(np.clip(0.6 - np.sqrt(area), 0, 1)), kind=function.__name__, solid=True)


def _thin(rng, width: int, height: int) -> Item:
    function, _, (low, high) = shapes.choose(rng, shapes.THIN)
    aspect = np.exp(rng.uniform(np.log(low), np.log(high)))
    long = rng.uniform(0.15, 0.9) * max(width, height)
    size = (long, long / aspect) if aspect > 1 else (long * aspect, long)
    mask = function(rng, (max(int(min(size[0], width)), 16), max(int(min(size[1], height)), 16)))
    item = Item(mask=mask, depth=0.2, kind=function.__name__)
    return _centre(item, rng.uniform(0.05, 0.95, 2) * (width, height))


def _group(rng, count: int, area: float, width, height, style, horizon, group: int) -> list[tuple[float, Item]]:
    """Copies of one thing, side by side or heaped, in one material."""
    row = shapes.choose(rng, shapes.SOLID)
    first = _solid(rng, area, width, height, style, row)
    start = _spot(rng, first, area, width, height, style, horizon)
    direction = np.array([1.0, rng.uniform(-0.3, 0.3)]) * rng.uniform(0.45, 1.0) * first.mask.size
    heap, direction = rng.random() < 0.3, direction * rng.choice([-1, 1])
    out = []
    for k in range(count):
        item = _solid(rng, area * rng.uniform(0.7, 1.4), width, height, style, row)
        item.group = group
        scatter = rng.normal(0, 0.8 if heap else 0.06, 2) * first.mask.size
        spot = start + scatter + (0 if heap else k) * direction
        out.append((spot[1] / height + 1e-4 * k, _centre(item, spot)))
    return out


def _spot(rng, item: Item, area: float, width: int, height: int, style: str, horizon: float) -> np.ndarray:
    """Centre of a new silhouette: standing on the ground, larger ones nearer; or anywhere."""
    x = rng.uniform(0.0, 1.0) * width
    half = item.mask.size[1] / 2
    if style in ("outdoor", "room") and rng.random() < 0.75:
        near = np.clip(np.sqrt(area) / 0.5 + 0.25 * rng.standard_normal(), 0.02, 1.1)
        return np.array([x, horizon + (height - horizon) * near - half * rng.uniform(0.8, 1)])
    if style == "shelf" and item.mask.size[1] < horizon:
        level = int(rng.integers(1, max(int(round(height / horizon)), 1) + 1))
        return np.array([x, level * horizon - half - height * 0.015])
    return np.array([x, rng.uniform(0.0, 1.0) * height])


def _centre(item: Item, spot) -> Item:
    width, height = item.mask.size
    return dataclasses.replace(item, corner=(int(spot[0] - width / 2), int(spot[1] - height / 2)))
