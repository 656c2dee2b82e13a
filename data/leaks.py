"""Finds pictures that show a part of others: validation photographs among those of training.

Square blocks of every picture are compared with all places in the others, pixel by pixel through a hash, also
mirrored. So a copy or a crop is found at any offset, as long as its pixels were kept; what has been resized or
compressed once more has to be followed by its provenance.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import UInt8, UInt64

from esg_jax.input.image_io import load_image

BLOCK = 16  # side of the squares in pixels
GRID = 8  # blocks per axis that are looked for: an overlap of a quarter of both sides holds some
# Blocks of sky or night repeat by chance: standard deviation of gray values that a block must have.
TEXTURE = 8.0
# Two blocks that agree by chance are no evidence of a copy.
ENOUGH = 2
_RNG = np.random.default_rng(0)
_ROW, _COLUMN, _CHANNEL = (_RNG.integers(1, 2**63, size, dtype=np.uint64) | 1 for size in (BLOCK, BLOCK, 3))


def find_leaks(training: Mapping[str, Path], held_out: Mapping[str, Path]) -> list[tuple[str, str]]:
    """Pairs (training name, held-out name) of pictures that share pixels.

    Args:
        training, held_out: files by the name to report.

    Raises:
        FileNotFoundError, ImageError: a file is missing or unreadable.
    """
    wanted: dict[int, set[str]] = {}
    for name, path in training.items():
        image = load_image(path)
        for picture in (image, image[:, ::-1]):
            for key in _blocks(picture):
                wanted.setdefault(key, set()).add(name)
    keys = np.fromiter(wanted, np.uint64, len(wanted))
    keys.sort()
    pairs = []
    for held, path in held_out.items():
        places = _all_places(load_image(path)).ravel()
        found = keys[np.isin(keys, places)]
        counts: dict[str, int] = {}
        for key in found.tolist():
            for name in wanted[key]:
                counts[name] = counts.get(name, 0) + 1
        pairs += [(name, held) for name, count in counts.items() if count >= ENOUGH]
    return sorted(pairs)


def _weighted(image: UInt8[np.ndarray, "h w 3"]) -> UInt64[np.ndarray, "h w"]:
    return (image.astype(np.uint64) * _CHANNEL).sum(-1, dtype=np.uint64)  # modulo 2^64, as all sums here


def _all_places(image: UInt8[np.ndarray, "h w 3"]) -> UInt64[np.ndarray, "y x"]:
    """Hash of the block at every place."""
    values = _weighted(image)
    height, width = (max(side - BLOCK + 1, 0) for side in values.shape)
    rows = np.zeros((values.shape[0], width), np.uint64)
    for step in range(BLOCK):
        rows += values[:, step : step + width] * _COLUMN[step]
    out = np.zeros((height, width), np.uint64)
    for step in range(BLOCK):
        out += rows[step : step + height] * _ROW[step]
    return out


def _blocks(image: UInt8[np.ndarray, "h w 3"]) -> list[int]:
    """Hashes of the textured blocks of a grid."""
    height, width = image.shape[:2]
    if min(height, width) < BLOCK:
        return []
    corners = (np.linspace(0, side - BLOCK, GRID).astype(int) for side in (height, width))
    blocks = np.lib.stride_tricks.sliding_window_view(image, (BLOCK, BLOCK), axis=(0, 1))[np.ix_(*corners)]
    blocks = blocks.reshape(-1, 3, BLOCK, BLOCK)
    blocks = blocks[blocks.mean(1).std((1, 2)) >= TEXTURE].astype(np.uint64)
    weights = _CHANNEL[:, None, None] * _ROW[:, None] * _COLUMN
    return (blocks * weights).sum((1, 2, 3), dtype=np.uint64).tolist()
