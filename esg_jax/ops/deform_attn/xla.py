"""Multi-scale deformable attention in plain XLA: the definition that every kernel is tested against.

Deformable DETR (arXiv 2010.04159), eq. 3: a query sums `weight * bilinear(value, location)` over levels and points.
Each sample is four rows of the value map, so the whole op is one gather of `4 * levels * points` rows per
(query, head), followed by a weighted sum. Queries are processed in chunks whose gathered rows stay in cache; without
chunks five views of 800x1333 would need tens of gigabytes. The backward pass gathers again instead of keeping rows.
"""

import numpy as np
from jax import checkpoint, lax, vmap
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

Shapes = tuple[tuple[int, int], ...]

# Bytes of gathered float32 rows per chunk: about the last-level cache of a CPU core.
_CHUNK_BYTES = 24 << 20


def level_starts(shapes: Shapes) -> list[int]:
    """Row of the concatenated value map at which every level begins."""
    return [0, *np.cumsum([h * w for h, w in shapes]).tolist()][:-1]


def corner_rows(
    shapes: Shapes,
    locations: Float[Array, "*batch L P 2"],
    weights: Float[Array, "*batch L P"],
) -> tuple[Int[Array, "*batch K"], Float[Array, "*batch K"]]:
    """The K = 4*L*P value rows of every query and the coefficient of each.

    Corners outside their level get coefficient 0 and an arbitrary valid row.
    """
    start, height, width = (
        np.array(values, np.int32)[:, None]
        for values in (level_starts(shapes), [h for h, _ in shapes], [w for _, w in shapes])
    )
    x0, x1, wx0, wx1 = _linear_taps(locations[..., 0], width)
    y0, y1, wy0, wy1 = _linear_taps(locations[..., 1], height)
    row0, row1 = start + y0 * width, start + y1 * width
    rows = jnp.stack([row0 + x0, row0 + x1, row1 + x0, row1 + x1], -1)
    wy0, wy1 = wy0 * weights, wy1 * weights
    coefficients = jnp.stack([wy0 * wx0, wy0 * wx1, wy1 * wx0, wy1 * wx1], -1)
    flat = (*rows.shape[:-3], -1)
    return rows.reshape(flat), coefficients.reshape(flat)


def _linear_taps(location, size):
    """Two neighbouring pixel indices along one axis, clipped to the map, and their weights (0 outside)."""
    # Clipping first keeps huge offsets inside int32 and NaN-free; at -1 and `size` both weights are zero anyway.
    pixel = jnp.clip(location * size.astype(np.float32) - 0.5, -1.0, size.astype(np.float32))
    low = jnp.floor(pixel)
    fraction = pixel - low
    low = low.astype(jnp.int32)
    high = low + 1
    last = size - 1
    return (
        jnp.clip(low, 0, last),
        jnp.clip(high, 0, last),
        jnp.where((low >= 0) & (low <= last), 1.0 - fraction, 0.0),
        jnp.where(high <= last, fraction, 0.0),
    )


def _take_rows(values_sd, rows):
    return values_sd.at[rows].get(mode="promise_in_bounds")


def deform_attn_xla(values_bshd, shapes: Shapes, locations_bqhlp2, weights_bqhlp):
    """See `api.deform_attn`; arguments are already checked."""
    batch, _, heads, channels = values_bshd.shape
    queries, levels, points = locations_bqhlp2.shape[1], locations_bqhlp2.shape[3], locations_bqhlp2.shape[4]
    if 0 in (*values_bshd.shape, *locations_bqhlp2.shape):
        return jnp.zeros((batch, queries, heads * channels), values_bshd.dtype)
    # Heads in front: a head's whole map is then contiguous, and small enough to stay in cache.
    values_bhsd = values_bshd.transpose(0, 2, 1, 3)

    def attend(locations, weights):
        rows_bqhk, coefficients_bqhk = corner_rows(shapes, locations, weights)
        gathered_bhqkd = vmap(vmap(_take_rows))(values_bhsd, rows_bqhk.transpose(0, 2, 1, 3))
        out = jnp.einsum("bhqkd,bqhk->bqhd", gathered_bhqkd, coefficients_bqhk, preferred_element_type=jnp.float32)
        return out.reshape(batch, locations.shape[1], heads * channels).astype(values_bshd.dtype)

    chunk = max(1, _CHUNK_BYTES // (4 * 4 * batch * heads * levels * points * channels))
    if chunk >= queries:
        return attend(locations_bqhlp2, weights_bqhlp)
    chunks = -(-queries // chunk)
    chunk = -(-queries // chunks)

    def split(array):
        padding = [(0, 0), (0, chunks * chunk - queries), *[(0, 0)] * (array.ndim - 2)]
        return jnp.moveaxis(jnp.pad(array, padding).reshape(batch, chunks, chunk, *array.shape[2:]), 1, 0)

    body = checkpoint(attend, prevent_cse=False)
    out = lax.map(lambda args: body(*args), (split(locations_bqhlp2), split(weights_bqhlp)))
    return jnp.moveaxis(out, 0, 1).reshape(batch, chunks * chunk, -1)[:, :queries]
