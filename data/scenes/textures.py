"""Surface textures: real photographs that scikit-image ships, and periodic procedural patterns.

Only photographs that are CC0, public domain or without known copyright restrictions are used (README.md lists them),
so that weights trained on the scenes can be redistributed.
"""

import functools
from importlib import resources

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw
from scipy import ndimage, spatial

from esg_jax.input.image_io import load_image

# Name -> file below skimage/data and the box (x0, y0, x1, y1) that is used, None for everything.
PHOTOS: dict[str, tuple[str, tuple[int, int, int, int] | None]] = {
    "astronaut": ("astronaut.png", None),
    "camera": ("camera.png", None),
    "cat": ("chelsea.png", None),
    "clock": ("clock_motion.png", None),
    "coffee": ("coffee.png", None),
    "coins": ("coins.png", None),
    "galaxies": ("hubble_deep_field.jpg", None),
    "rocket": ("rocket.jpg", None),
    "text": ("text.png", None),
    "tissue": ("ihc.png", None),
    # Parts of photographs that show one material.
    "brick": ("brick.png", None),
    "fur": ("chelsea.png", (120, 180, 440, 300)),
    "grass": ("grass.png", None),
    "gravel": ("gravel.png", None),
    "retina": ("retina.jpg", (360, 360, 1050, 1050)),
    "suit": ("astronaut.png", (60, 330, 220, 500)),
    "table": ("coffee.png", (0, 230, 190, 400)),
}
MATERIAL_PHOTOS = ("brick", "fur", "grass", "gravel", "retina", "suit", "table", "tissue")
SCENIC_PHOTOS = ("astronaut", "camera", "cat", "clock", "coffee", "coins", "galaxies", "rocket", "text")

TILE = 768  # side of the procedural tiles in pixels
VARIANTS = 3


@functools.cache
def photo(name: str) -> UInt8[np.ndarray, "h w 3"]:
    """RGB pixels of an entry of `PHOTOS`.

    Raises:
        FileNotFoundError: scikit-image is not installed, or lacks the file.
    """
    file, box = PHOTOS[name]
    try:
        pixels = load_image((resources.files("skimage") / "data" / file).read_bytes(), file)
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise FileNotFoundError(f"photograph {file} of scikit-image not found: pip install 'scikit-image'") from error
    if box:
        pixels = pixels[box[1] : box[3], box[0] : box[2]]
    return np.ascontiguousarray(pixels)


@functools.cache
def pattern(kind: str, variant: int) -> UInt8[np.ndarray, "tile tile"]:
    """Gray periodic tile of `PATTERNS[kind]`; `variant` in 0..VARIANTS-1 is its seed."""
    rng = np.random.default_rng([variant, *kind.encode()])
    values = PATTERNS[kind](rng).astype(np.float32)
    low, high = np.percentile(values, (1, 99))
    return np.clip((values - low) / max(high - low, 1e-6) * 255, 0, 255).astype(np.uint8)


def window(texture: np.ndarray, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """(height, width) pixels at a random place; patterns continue periodically, photographs by mirroring."""
    periodic = texture.shape == (TILE, TILE)
    rows = _index(height, texture.shape[0], periodic, rng)
    columns = _index(width, texture.shape[1], periodic, rng)
    return texture[rows][:, columns]


def _index(length: int, size: int, periodic: bool, rng: np.random.Generator) -> np.ndarray:
    if periodic:
        return (int(rng.integers(0, size)) + np.arange(length)) % size
    start = int(rng.integers(0, size - length + 1)) if length <= size else int(rng.integers(0, size))
    index = (start + np.arange(length)) % (2 * size)
    return np.where(index < size, index, 2 * size - 1 - index)


def spectral_noise(rng: np.random.Generator, slope: float, aspect: float = 1.0, size: int = TILE) -> np.ndarray:
    """Periodic Gaussian noise with amplitude spectrum 1 / frequency^slope; `aspect` > 1 stretches it along x."""
    fy = np.fft.fftfreq(size)[:, None]
    fx = np.fft.rfftfreq(size)[None] * aspect
    frequency = np.maximum(np.hypot(fy, fx), 1.0 / size)
    spectrum = np.fft.rfft2(rng.standard_normal((size, size)).astype(np.float32))
    noise = np.fft.irfft2(spectrum / frequency**slope, s=(size, size))
    return ((noise - noise.mean()) / noise.std()).astype(np.float32)


def _grid(size: int = TILE) -> tuple[np.ndarray, np.ndarray]:
    axis = np.arange(size, dtype=np.float32) / size
    return axis[:, None], axis[None]


def _wood(rng):
    y, x = _grid()
    bend = spectral_noise(rng, 2.2, aspect=0.15)
    rings = np.sin(2 * np.pi * (rng.integers(6, 18) * x + 0.25 * bend))
    return rings + 0.7 * spectral_noise(rng, 0.8, aspect=12.0).T + 0 * y


def _marble(rng):
    y, x = _grid()
    phase = rng.integers(1, 4) * x + rng.integers(1, 4) * y + rng.uniform(0.2, 0.5) * spectral_noise(rng, 1.8)
    return np.abs(np.sin(np.pi * 2 * phase)) ** 0.5 + 0.15 * spectral_noise(rng, 1.0)


def _stripes(rng):
    y, x = _grid()
    wobble = 0.04 * spectral_noise(rng, 2.5)
    wave = np.sin(2 * np.pi * (rng.integers(8, 40) * (x + 0 * y) + wobble * rng.integers(0, 4)))
    return np.clip(wave * rng.uniform(2, 10) + rng.uniform(-0.5, 0.5), -1, 1) + 0.1 * spectral_noise(rng, 1.0)


def _plaid(rng):
    def bands():
        line = np.repeat(rng.random(24), TILE // 24)
        return np.tile(line[: TILE // 3], 3)

    return bands()[:, None] + bands()[None] + 0.05 * spectral_noise(rng, 0.3)


def _checks(rng):
    y, x = _grid()
    count = int(rng.integers(6, 24))
    return ((x * count).astype(int) + (y * count).astype(int)) % 2 + 0.12 * spectral_noise(rng, 1.2)


def _dots(rng):
    y, x = _grid()
    count = int(rng.integers(8, 30))
    cell_x, cell_y = (x * count) % 1 - 0.5, (y * count) % 1 - 0.5
    return (np.hypot(cell_x, cell_y) < rng.uniform(0.15, 0.4)) + 0.1 * spectral_noise(rng, 1.0)


def _weave(rng):
    y, x = _grid()
    count = int(rng.integers(30, 90))
    over = np.sin(2 * np.pi * count * x) * np.sin(2 * np.pi * count * y)
    return over + 0.4 * spectral_noise(rng, 0.6) + 0.5 * spectral_noise(rng, 2.0)


def _tiles(rng):
    rows, columns = int(rng.integers(6, 24)), int(rng.integers(4, 16))
    y, x = _grid()
    row = (y * rows).astype(int)
    shifted = (x * columns + rng.choice([0.0, 0.5]) * (row % 2)) % columns
    tone = rng.random((rows, columns))[row, shifted.astype(int)]
    gap = rng.uniform(0.02, 0.08)
    joint = ((y * rows) % 1 < gap * 1.6) | (shifted % 1 < gap)
    return np.where(joint, rng.choice([-0.5, 1.5]), 0.6 * tone) + 0.15 * spectral_noise(rng, 1.0)


def _cells(rng):
    size = TILE // 2
    points = rng.random((int(rng.integers(40, 400)), 2)) * size
    tree = spatial.cKDTree(points, boxsize=size)
    places = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"), -1)
    distance, nearest = tree.query(places, k=2)
    edge = np.clip((distance[..., 1] - distance[..., 0]) / 4, 0, 1)
    small = edge * (0.5 + rng.random(len(points))[nearest[..., 0]])
    return np.kron(small, np.ones((2, 2))) + 0.1 * spectral_noise(rng, 1.0)


def _strokes(rng):
    """Short lines, like grass, straw or fur."""
    image = Image.new("L", (TILE, TILE), 90)
    draw = ImageDraw.Draw(image)
    direction, spread = rng.uniform(0, np.pi), rng.uniform(0.1, 0.6)
    length = rng.uniform(15, 60)
    for _ in range(5000):
        x, y = rng.random(2) * TILE
        angle = direction + spread * rng.standard_normal()
        step = np.array([np.cos(angle), np.sin(angle)]) * length * rng.uniform(0.4, 1)
        draw.line((x, y, x + step[0], y + step[1]), fill=int(rng.integers(20, 240)), width=int(rng.integers(1, 4)))
    return ndimage.gaussian_filter(np.asarray(image, np.float32), 0.7)


def _leaves(rng):
    """Overlapping shaded ellipses, like foliage or pebbles."""
    image = Image.new("L", (TILE, TILE), 40)
    draw = ImageDraw.Draw(image)
    size, squeeze = rng.uniform(8, 28), rng.uniform(0.35, 1)
    turn = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    for step in range(int(60_000 / size)):
        x, y = rng.random(2) * TILE
        angle, scale = rng.uniform(0, np.pi), size * rng.uniform(0.5, 1.2)
        px, py = np.cos(turn) * scale, np.sin(turn) * scale * squeeze
        c, s = np.cos(angle), np.sin(angle)
        tone = int(40 + 180 * (step * size / 60_000) ** 0.7 * rng.uniform(0.6, 1.1))
        for factor, gain in ((1.0, 0.7), (0.75, 1.0)):
            points = np.stack([x + factor * (c * px - s * py), y + factor * (s * px + c * py)], -1)
            draw.polygon([tuple(point) for point in points], fill=min(255, int(tone * gain)))
    return ndimage.gaussian_filter(np.asarray(image, np.float32), 0.8)


PATTERNS = {
    "cloud": lambda rng: spectral_noise(rng, 2.0),
    "rough": lambda rng: spectral_noise(rng, 1.4),
    "grain": lambda rng: spectral_noise(rng, 0.9),
    "speckle": lambda rng: spectral_noise(rng, 0.3) ** 3 + spectral_noise(rng, 1.5),
    "brushed": lambda rng: spectral_noise(rng, 0.9, aspect=25.0),
    "ridges": lambda rng: -np.abs(spectral_noise(rng, 1.8)),
    "wood": _wood,
    "marble": _marble,
    "stripes": _stripes,
    "plaid": _plaid,
    "checks": _checks,
    "dots": _dots,
    "weave": _weave,
    "tiles": _tiles,
    "cells": _cells,
    "strokes": _strokes,
    "leaves": _leaves,
}
