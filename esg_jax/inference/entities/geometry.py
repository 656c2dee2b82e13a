"""Where the mask logits of every view land in the original image, as small interpolation tables.

The reference resizes mask logits three times: to the padded network input, (after cutting the padding off) to the
view's own pixels, and (crops) pastes them into the image. Every step is separable and linear, so per axis the chain
is one sparse matrix with at most four entries per image row. These tables are arguments of the compiled program:
images of any size share it.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from esg_jax.ops.resize import bilinear_taps

TAPS = 4


@dataclasses.dataclass(frozen=True)
class AxisTable:
    """Interpolation along one image axis, for every view.

    Attributes:
        index: cells of the mask logits that contribute to a pixel.
        weight: their weights; zero outside the view.
        cover: 1 inside the view, 0 outside.
    """

    index: Int[np.ndarray, "t s 4"]
    weight: Float[np.ndarray, "t s 4"]
    cover: Float[np.ndarray, "t s"]


def axis_table(
    cells: int,
    padded: int,
    sizes: Int[np.ndarray, "t"],
    starts: Int[np.ndarray, "t"],
    ends: Int[np.ndarray, "t"],
    length: int,
) -> AxisTable:
    """Composes the three steps along one axis (ESG, section 4.1).

    Args:
        cells: side of the mask logits.
        padded: side of the padded network input.
        sizes: side of every view inside the padding.
        starts, ends: the view's extent in original pixels, half open.
        length: rows of the tables; at least the side of the original image.

    Raises:
        ValueError: a view exceeds the padded side or the tables.
    """
    if np.any(sizes > padded) or np.any(ends > length) or np.any(starts < 0) or np.any(ends <= starts):
        raise ValueError(
            f"views of {sizes.tolist()} pixels at {starts.tolist()}..{ends.tolist()} do not fit into "
            f"a padded side of {padded} and an image side of {length}"
        )
    views = len(sizes)
    index = np.zeros((views, length, TAPS), np.int32)
    weight = np.zeros((views, length, TAPS), np.float32)
    cover = np.zeros((views, length), np.float32)
    low, high, fraction = bilinear_taps(cells, padded)
    for view, (size, start, end) in enumerate(zip(sizes, starts, ends, strict=True)):
        first, second, blend = bilinear_taps(int(size), int(end - start))
        index[view, start:end] = np.stack([low[first], high[first], low[second], high[second]], axis=1)
        weight[view, start:end] = np.stack(
            [
                (1 - blend) * (1 - fraction[first]),
                (1 - blend) * fraction[first],
                blend * (1 - fraction[second]),
                blend * fraction[second],
            ],
            axis=1,
        )
        cover[view, start:end] = 1
    return AxisTable(index, weight, cover)


def tile_starts(table: AxisTable, tile: int) -> tuple[Int[np.ndarray, "t n"], int]:
    """First cell that each tile of `tile` pixels needs from every view, and the most cells any of them needs."""
    views, length, _ = table.index.shape
    index = table.index.reshape(views, length // tile, tile * TAPS)
    inside = np.repeat(table.cover.reshape(views, length // tile, tile) > 0, TAPS, axis=-1)
    first = np.where(inside, index, np.iinfo(np.int32).max).min(-1)
    last = np.where(inside, index, -1).max(-1)
    first = np.where(last < 0, 0, first)
    return first.astype(np.int32), int((last - first).max()) + 1
