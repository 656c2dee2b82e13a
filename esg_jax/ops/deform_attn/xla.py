"""Multi-scale deformable attention in plain XLA: the definition that every kernel is tested against.

Deformable DETR (arXiv 2010.04159), eq. 3: a query sums `weight * bilinear(value, location)` over levels and points.
Each sample is four rows of the value map, so the whole op is one gather of K = 4 * levels * points rows per
(query, head), followed by a weighted sum.

Two nested scans bound memory. The outer one holds the K rows' indices and coefficients of a block of queries: they
must exist in memory, because XLA would otherwise fuse them into the gather and recompute them for every channel. The
inner one holds the gathered rows of a few queries, which then stay in cache. The backward pass is written by hand: it
gathers again instead of keeping rows, and adds into one float32 map that the scan updates in place.

A decoder's few hundred queries gather less than that map holds. Rearranging the map would then cost more than all
gathers, so they take one gather without scans.
"""

import functools

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

Shapes = tuple[tuple[int, int], ...]

# Measured on CPU (benchmarks/deform_attn.py): bytes of gathered float32 rows per inner step, and indices per outer one.
_CHUNK_BYTES = 4 << 20
_BLOCK_ROWS = 4 << 20


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


def _lower_pixel(location, size):
    """Index of the pixel centre at or below a location, float32 and unclipped, and the distance to it."""
    pixel = location * size.astype(np.float32) - 0.5
    low = jnp.floor(pixel)
    return low, pixel - low


def _linear_taps(location, size):
    """Two neighbouring pixel indices along one axis, clipped to the map, and their weights (0 outside)."""
    low, fraction = _lower_pixel(location, size)
    # Clipped before the cast, so that huge offsets stay inside int32.
    low = jnp.clip(low, -2, size + 1).astype(jnp.int32)
    high = low + 1
    last = size - 1
    return (
        jnp.clip(low, 0, last),
        jnp.clip(high, 0, last),
        jnp.where((low >= 0) & (low <= last), 1.0 - fraction, 0.0),
        jnp.where((high >= 0) & (high <= last), fraction, 0.0),
    )


def forward(values_bshd, shapes: Shapes, locations_bqhlp2, weights_bqhlp):
    """Output (B, Q, H*D) in the dtype of the values; see `api.deform_attn`, which checks the arguments."""
    if _few_queries(values_bshd, weights_bqhlp):
        return _forward_at_once(values_bshd, shapes, locations_bqhlp2, weights_bqhlp)
    batch, _, heads, channels = values_bshd.shape
    queries = locations_bqhlp2.shape[1]
    # Heads in front: a head's whole map is then contiguous, and small enough to stay in cache.
    values_bhsd, locations, weights = (_swap_heads(a) for a in (values_bshd, locations_bqhlp2, weights_bqhlp))
    block, chunk = _block_sizes(values_bshd.shape, weights_bqhlp.shape)

    def attend(rows_bhqk, coefficients_bhqk):
        out = jnp.einsum("bhqk,bhqkd->bhqd", coefficients_bhqk, _take(values_bhsd, rows_bhqk), precision="highest")
        return out.astype(values_bshd.dtype)

    def attend_block(locations, weights):
        return _map_queries(attend, chunk, corner_rows(shapes, locations, weights))

    out_bhqd = _map_queries(attend_block, block, (locations, weights))
    return _swap_heads(out_bhqd).reshape(batch, queries, heads * channels)


def backward(values_bshd, shapes: Shapes, locations_bqhlp2, weights_bqhlp, grad_out):
    """Gradients (values, locations, weights), all float32, for the gradient (B, Q, H*D) of the output."""
    if _few_queries(values_bshd, weights_bqhlp):
        return _vjp(_forward_at_once, values_bshd, shapes, locations_bqhlp2, weights_bqhlp, grad_out)
    batch, _, heads, channels = values_bshd.shape
    grad_bqhd = grad_out.astype(jnp.float32).reshape(batch, -1, heads, channels)
    args = (values_bshd, locations_bqhlp2, weights_bqhlp, grad_bqhd)
    # XLA's CPU scatter runs on one core; scans that do not depend on each other run side by side.
    parts = 2 if heads % 2 == 0 else 1
    grads = [_backward_heads(shapes, *part) for part in zip(*(jnp.split(a, parts, 2) for a in args), strict=True)]
    return tuple(jnp.concatenate(part, 2) for part in zip(*grads, strict=True))


def _backward_heads(shapes, values_bshd, locations_bqhlp2, weights_bqhlp, grad_bqhd):
    """`backward` of some of the heads."""
    values_bhsd, locations, weights, grad_bhqd = map(
        _swap_heads, (values_bshd, locations_bqhlp2, weights_bqhlp, grad_bqhd)
    )
    block, chunk = _block_sizes(values_bshd.shape, weights_bqhlp.shape)

    def pull(grad_values_bhsd, rows_bhqk, coefficients_bhqk, grad_bhqd):
        grad_coefficients = jnp.einsum(
            "bhqkd,bhqd->bhqk", _take(values_bhsd, rows_bhqk), grad_bhqd, precision="highest"
        )
        updates_bhqkd = coefficients_bhqk[..., None] * grad_bhqd[:, :, :, None]
        return _add(grad_values_bhsd, rows_bhqk, updates_bhqkd), grad_coefficients

    def pull_block(grad_values_bhsd, locations, weights, grad_bhqd):
        def corners(locations, weights):
            rows, coefficients = corner_rows(shapes, locations, weights)
            return coefficients, rows

        coefficients, pull_corners, rows = jax.vjp(corners, locations, weights, has_aux=True)
        grad_values_bhsd, grad_coefficients = _scan_queries(
            pull, chunk, grad_values_bhsd, (rows, coefficients, grad_bhqd)
        )
        return grad_values_bhsd, pull_corners(grad_coefficients)

    grad_values_bhsd, grads = _scan_queries(
        pull_block, block, jnp.zeros(values_bhsd.shape, jnp.float32), (locations, weights, grad_bhqd)
    )
    return tuple(_swap_heads(a) for a in (grad_values_bhsd, *grads))


def _few_queries(values_bshd, weights_bqhlp):
    """Whether a head gathers at most as many rows as its map has. The forms are level at about 1.5 times as many."""
    _, queries, _, levels, points = weights_bqhlp.shape
    return 4 * queries * levels * points <= values_bshd.shape[1]


def _forward_at_once(values_bshd, shapes, locations_bqhlp2, weights_bqhlp):
    """`forward` by one gather from the map as it is."""
    batch, _, heads, channels = values_bshd.shape
    rows_bqhk, coefficients_bqhk = corner_rows(shapes, locations_bqhlp2, weights_bqhlp)

    def take(values_shd, rows_qhk):
        return values_shd.at[rows_qhk, np.arange(heads)[:, None]].get(mode="promise_in_bounds")

    corners_bqhkd = jax.vmap(take)(values_bshd, rows_bqhk).astype(jnp.float32)
    out_bqhd = jnp.einsum("bqhk,bqhkd->bqhd", coefficients_bqhk, corners_bqhkd, precision="highest")
    return out_bqhd.reshape(batch, -1, heads * channels).astype(values_bshd.dtype)


def packed_forward(values_bshd, shapes: Shapes, locations_bqhlp2, weights_bqhlp):
    """`forward` for TPUs: the four corners of a sample are packed into one row of 4*D channels.

    TPU gathers cost per row and move 128 lanes each, so one row of 4*32 channels costs a quarter of four rows. The
    packed map is four times larger, which is why CPUs prefer `forward`. Differentiated automatically.
    """
    batch, _, heads, channels = values_bshd.shape
    queries = locations_bqhlp2.shape[1]
    packed_bhrd = _pack_corners(_swap_heads(values_bshd), shapes)
    block, _ = _block_sizes(values_bshd.shape, weights_bqhlp.shape)

    @jax.checkpoint
    def attend(locations, weights):
        rows_bhqk, coefficients_bhqkc = _packed_rows(shapes, locations, weights)
        corners = _take(packed_bhrd, rows_bhqk).reshape(*rows_bhqk.shape, 4, channels)
        return jnp.einsum("bhqkcd,bhqkc->bhqd", corners, coefficients_bhqkc, precision="highest")

    out_bhqd = _map_queries(attend, block, (_swap_heads(locations_bqhlp2), _swap_heads(weights_bqhlp)))
    return _swap_heads(out_bhqd).reshape(batch, queries, heads * channels).astype(values_bshd.dtype)


def _pack_corners(values_bhsd, shapes):
    """(B, H, sum (h+1)*(w+1), 4*D): pixel (y, x) from -1 on beside its right, lower and lower right neighbours."""
    levels = []
    for start, (height, width) in zip(level_starts(shapes), shapes, strict=True):
        level = values_bhsd[:, :, start : start + height * width]
        level = level.reshape(*level.shape[:2], height, width, -1)
        level = jnp.pad(level, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
        corners = [level[:, :, y : y + height + 1, x : x + width + 1] for y in (0, 1) for x in (0, 1)]
        levels.append(jnp.concatenate(corners, -1).reshape(*level.shape[:2], (height + 1) * (width + 1), -1))
    return jnp.concatenate(levels, 2)


def _packed_rows(shapes, locations, weights):
    """Rows of the packed map (..., L*P) and the coefficients of their corners (..., L*P, 4)."""
    padded = tuple((height + 1, width + 1) for height, width in shapes)
    start, height, width = (
        np.array(values, np.int32)[:, None]
        for values in (level_starts(padded), [h for h, _ in shapes], [w for _, w in shapes])
    )
    x, x_fraction = _lower_pixel(locations[..., 0], width)
    y, y_fraction = _lower_pixel(locations[..., 1], height)
    inside = (x >= -1) & (x < width) & (y >= -1) & (y < height)
    column, row = (jnp.where(inside, low, -1).astype(jnp.int32) + 1 for low in (x, y))
    weights = jnp.where(inside, weights, 0.0)
    top, bottom = weights * (1.0 - y_fraction), weights * y_fraction
    coefficients = [top * (1.0 - x_fraction), top * x_fraction, bottom * (1.0 - x_fraction), bottom * x_fraction]
    flat = (*weights.shape[:-2], -1)
    rows = (start + row * (width + 1) + column).reshape(flat)
    return rows, jnp.stack(coefficients, -1).reshape(*rows.shape, 4)


def packed_backward(values_bshd, shapes: Shapes, locations_bqhlp2, weights_bqhlp, grad_out):
    """`backward` of `packed_forward`."""
    return _vjp(packed_forward, values_bshd, shapes, locations_bqhlp2, weights_bqhlp, grad_out)


def _vjp(forward, values, shapes, locations, weights, grad_out):
    """Float32 gradients by automatic differentiation."""

    def function(values, locations, weights):
        return forward(values, shapes, locations, weights)

    _, pull = jax.vjp(function, values.astype(jnp.float32), locations, weights)
    return pull(grad_out.astype(jnp.float32))


def _swap_heads(array):
    return jnp.swapaxes(array, 1, 2)


def _block_sizes(values_shape, weights_shape):
    """Queries of the outer and of the inner scan."""
    batch, _, heads, channels = values_shape
    rows_per_query = 4 * batch * heads * weights_shape[3] * weights_shape[4]
    chunk = max(1, _CHUNK_BYTES // (4 * channels * rows_per_query))
    return max(chunk, _BLOCK_ROWS // rows_per_query), chunk


@functools.partial(jax.vmap, in_axes=(0, 0))
@functools.partial(jax.vmap, in_axes=(0, 0))
def _take(values_sd, rows_qk):
    rows = values_sd.at[rows_qk.reshape(-1)].get(mode="promise_in_bounds")
    return rows.reshape(*rows_qk.shape, -1).astype(jnp.float32)


@functools.partial(jax.vmap, in_axes=(0, 0, 0))
@functools.partial(jax.vmap, in_axes=(0, 0, 0))
def _add(grad_values_sd, rows_qk, updates_qkd):
    updates = updates_qkd.reshape(-1, updates_qkd.shape[-1])
    return grad_values_sd.at[rows_qk.reshape(-1)].add(updates, mode="promise_in_bounds")


def _map_queries(function, size, args):
    """`function(*args)` computed for `size` queries (axis 2 of every array) at a time."""
    return _scan_queries(lambda _, *chunk: (None, function(*chunk)), size, None, args)[1]


def _scan_queries(function, size, carry, args):
    """Scan of `carry, outputs = function(carry, *args)` over chunks of at most `size` queries, axis 2 of every array.

    Zero padding of the last chunk adds zeros everywhere, since the padded coefficients are zero.
    """
    queries = args[0].shape[2]
    chunks = -(-queries // size)
    if chunks == 1:
        return function(carry, *args)
    size = -(-queries // chunks)

    def split(array):
        padding = [(0, chunks * size - queries) if axis == 2 else (0, 0) for axis in range(array.ndim)]
        padded = jnp.pad(array, padding)
        return jnp.moveaxis(padded.reshape(*array.shape[:2], chunks, size, *array.shape[3:]), 2, 0)

    def join(array):
        array = jnp.moveaxis(array, 0, 2)
        return array.reshape(*array.shape[:2], chunks * size, *array.shape[4:])[:, :, :queries]

    carry, outputs = lax.scan(lambda carry, chunk: function(carry, *chunk), carry, tuple(map(split, args)))
    return carry, jax.tree.map(join, outputs)
