"""Multi-scale deformable attention on TPU: separable bilinear sampling as matrix products (Pallas, Mosaic).

TPUs gather slowly but multiply matrices fast. Bilinear interpolation is separable and each axis is a "tent",
`max(0, 1 - |pixel - position|)`, so sampling one map row for all queries of a block is the product of the map
(channels x columns) with a matrix of tents (columns x queries), and the rows are then added with the tents of y.
Queries are in lanes. Only the row chunks that a block of queries touches are visited: their range is computed
beforehand and prefetched as scalars, so the result is exact for any offset and fast when offsets are local.

The backward pass uses the derivative of the tent for the locations, and one more matrix product for the values. That
product accumulates into a block which stays in VMEM while all queries of a head pass by: no atomics, deterministic.

One kernel call per level; docs/kernels.md has a figure and the arithmetic.
"""

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from esg_jax.ops.deform_attn.xla import Shapes, level_starts

_CHUNK_ROWS = 8
_LANES = 128
# Scoped VMEM of a v4; the other generations have as much or more.
_VMEM_BYTES = 16 << 20


def unsupported(values_shape, values_dtype, shapes: Shapes, points: int) -> str | None:
    """Why these arguments do not fit, or None. The largest level's map and its gradient must fit in VMEM."""
    if values_dtype not in (jnp.float32, jnp.bfloat16):
        return f"values are {values_dtype}, but the TPU kernel takes float32 or bfloat16"
    channels = _round_up(values_shape[3], _CHUNK_ROWS)
    itemsize = jnp.dtype(values_dtype).itemsize
    for height, width in shapes:
        padded = _round_up(width, _LANES)
        pixels = _round_up(height, _CHUNK_ROWS) * padded * channels
        tents = 2 * points * padded * _QUERIES * itemsize
        needed = pixels * (itemsize + 2 * 4) + tents + (3 << 20)
        if needed > _VMEM_BYTES:
            return f"level {height}x{width} with {channels} channels needs {needed >> 20} MiB of VMEM, more than 16"
    return None


# Queries per block: two lane tiles keep the matrix unit's weights busy.
_QUERIES = 256


def forward(values_bshd, shapes: Shapes, locations_bqhlp2, weights_bqhlp, *, interpret: bool = False):
    """Output (B, Q, H*D) in the dtype of the values."""
    batch, _, heads, channels = values_bshd.shape
    queries = locations_bqhlp2.shape[1]
    total = 0.0
    for level, (height, width) in enumerate(shapes):
        maps = _transposed_map(values_bshd, shapes, level)
        x, y, attention = _lanes(locations_bqhlp2, weights_bqhlp, level, height, width)
        total += _sample_level(maps, x, y, attention, _chunk_range(x, y, height, width), interpret)
    out = total[:, :channels, :queries].reshape(batch, heads, channels, queries)
    return out.transpose(0, 3, 1, 2).reshape(batch, queries, heads * channels).astype(values_bshd.dtype)


def backward(values_bshd, shapes: Shapes, locations_bqhlp2, weights_bqhlp, grad_out, *, interpret: bool = False):
    """Gradients (values, locations, weights), all float32, for the gradient (B, Q, H*D) of the output."""
    batch, _, heads, channels = values_bshd.shape
    queries, points = locations_bqhlp2.shape[1], locations_bqhlp2.shape[4]
    grad = grad_out.astype(jnp.float32).reshape(batch, queries, heads, channels).transpose(0, 2, 3, 1)
    grad = grad.reshape(batch * heads, channels, queries)
    padded_channels, padded_queries = _round_up(channels, _CHUNK_ROWS), _round_up(queries, _QUERIES)
    grad = jnp.pad(grad, ((0, 0), (0, padded_channels - channels), (0, padded_queries - queries)))

    def per_query(gradient):
        return gradient[:, :, :queries].reshape(batch, heads, points, queries).transpose(0, 3, 1, 2)

    grad_values, grad_locations, grad_weights = [], [], []
    for level, (height, width) in enumerate(shapes):
        maps = _transposed_map(values_bshd, shapes, level)
        x, y, attention = _lanes(locations_bqhlp2, weights_bqhlp, level, height, width)
        chunk_range = _chunk_range(x, y, height, width)
        grad_map, grad_x, grad_y, grad_attention = _pull_level(maps, x, y, attention, grad, chunk_range, interpret)
        grad_map = grad_map.reshape(batch, heads, -1, padded_channels, maps.shape[-1])[:, :, :height, :channels, :width]
        grad_values.append(grad_map.transpose(0, 2, 4, 1, 3).reshape(batch, height * width, heads, channels))
        grad_locations.append(jnp.stack([per_query(grad_x) * width, per_query(grad_y) * height], -1))
        grad_weights.append(per_query(grad_attention))
    return jnp.concatenate(grad_values, 1), jnp.stack(grad_locations, 3), jnp.stack(grad_weights, 3)


def _transposed_map(values_bshd, shapes, level):
    """(B*H, chunks, 8*D, W): eight map rows x channels per chunk, columns in lanes; zero padded."""
    batch, _, heads, channels = values_bshd.shape
    height, width = shapes[level]
    start = level_starts(shapes)[level]
    maps = values_bshd[:, start : start + height * width].reshape(batch, height, width, heads, channels)
    padded_height, padded_channels = _round_up(height, _CHUNK_ROWS), _round_up(channels, _CHUNK_ROWS)
    maps = jnp.pad(
        maps.transpose(0, 3, 1, 4, 2),
        (
            (0, 0),
            (0, 0),
            (0, padded_height - height),
            (0, padded_channels - channels),
            (0, _round_up(width, _LANES) - width),
        ),
    )
    return maps.reshape(batch * heads, padded_height // _CHUNK_ROWS, _CHUNK_ROWS * padded_channels, maps.shape[-1])


def _lanes(locations_bqhlp2, weights_bqhlp, level, height, width):
    """x, y in pixels and attention, each (B*H, P, queries padded to blocks), of one level."""
    queries = locations_bqhlp2.shape[1]
    padding = _round_up(queries, _QUERIES) - queries

    def move(array, fill):
        array = array.transpose(0, 2, 3, 1).reshape(-1, array.shape[3], queries)
        return jnp.pad(array, ((0, 0), (0, 0), (0, padding)), constant_values=fill)

    # Padded queries lie outside the map, so that they widen no chunk range.
    return (
        move(locations_bqhlp2[:, :, :, level, :, 0] * float(width) - 0.5, -2.0),
        move(locations_bqhlp2[:, :, :, level, :, 1] * float(height) - 0.5, -2.0),
        move(weights_bqhlp[:, :, :, level], 0.0),
    )


def _chunk_range(x, y, height, width):
    """int32 first and one past last row chunk that each (B*H, block) touches; first >= last where it touches none."""
    # At -1 exactly the sample is zero but its slope is not.
    inside = (x >= -1.0) & (x < width) & (y >= -1.0) & (y < height)
    rows = jnp.clip(jnp.floor(y), -1, height).astype(jnp.int32)
    blocks = (x.shape[0], x.shape[1], -1, _QUERIES)
    first = jnp.where(inside, jnp.maximum(rows, 0), height).reshape(blocks).min((1, 3))
    last = jnp.where(inside, jnp.minimum(rows + 1, height - 1), -1).reshape(blocks).max((1, 3))
    # Flat: scalar memory pads the last of two dimensions to 128.
    return (first // _CHUNK_ROWS).reshape(-1), ((last + _CHUNK_ROWS) // _CHUNK_ROWS).reshape(-1)


def _tent(distance):
    return jnp.maximum(0.0, 1.0 - jnp.abs(distance))


def _tent_slope(distance):
    """Derivative of tent(pixel - position) with respect to position; the right-hand one at the kinks, as `floor`."""
    return jnp.where((distance > 0.0) & (distance <= 1.0), 1.0, 0.0) - jnp.where(
        (distance > -1.0) & (distance <= 0.0), 1.0, 0.0
    )


def _dot(a, b, contract):
    # float32 products need all passes of the matrix unit; bfloat16 operands are exact in one.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _row_distance(chunk, y):
    """Distance of the chunk's eight rows from y (1, queries)."""
    rows = lax.broadcasted_iota(jnp.int32, (_CHUNK_ROWS, y.shape[-1]), 0) + chunk * _CHUNK_ROWS
    return rows.astype(jnp.float32) - y


def _column_distance(columns, x):
    return lax.broadcasted_iota(jnp.int32, (columns, x.shape[-1]), 0).astype(jnp.float32) - x


def _sample_kernel(first_ref, last_ref, map_ref, x_ref, y_ref, attention_ref, out_ref, tent_ref):
    """One (head, query block): out (D, queries) = sum over chunks, points and rows of map @ tent_x * tent_y."""
    block = pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)
    points, columns, _ = tent_ref.shape
    channels = out_ref.shape[1]
    for point in range(points):
        tent_ref[point] = _tent(_column_distance(columns, x_ref[0, point : point + 1])).astype(tent_ref.dtype)

    def chunk_step(chunk, out):
        map_rows = map_ref[0, chunk]
        for point in range(points):
            sampled = _dot(map_rows, tent_ref[point], ((1,), (0,)))
            weight = _tent(_row_distance(chunk, y_ref[0, point : point + 1])) * attention_ref[0, point : point + 1]
            for row in range(_CHUNK_ROWS):
                out += sampled[row * channels : (row + 1) * channels] * weight[row : row + 1]
        return out

    out_ref[0] = lax.fori_loop(first_ref[block], last_ref[block], chunk_step, jnp.zeros(out_ref.shape[1:], jnp.float32))


def _pull_kernel(
    first_ref,
    last_ref,
    map_ref,
    x_ref,
    y_ref,
    attention_ref,
    grad_ref,
    grad_map_ref,
    grad_x_ref,
    grad_y_ref,
    grad_attention_ref,
    tent_ref,
    slope_ref,
):
    """One (head, query block): gradients of its x, y (per pixel) and attention, and its share of the map's gradient."""
    block = pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)
    points, columns, queries = tent_ref.shape
    channels = grad_ref.shape[1]

    @pl.when(pl.program_id(1) == 0)
    def _():
        grad_map_ref[...] = jnp.zeros(grad_map_ref.shape, jnp.float32)

    for point in range(points):
        distance = _column_distance(columns, x_ref[0, point : point + 1])
        tent_ref[point] = _tent(distance).astype(tent_ref.dtype)
        slope_ref[point] = _tent_slope(distance).astype(slope_ref.dtype)

    def chunk_step(chunk, sums):
        map_rows = map_ref[0, chunk]
        grad = grad_ref[0]
        map_gradient = jnp.zeros(map_rows.shape, jnp.float32)
        new_sums = []
        for point in range(points):
            attention = attention_ref[0, point : point + 1]
            distance = _row_distance(chunk, y_ref[0, point : point + 1])
            tent_y = _tent(distance)

            def dot_with_grad(tents):
                sampled = _dot(map_rows, tents, ((1,), (0,))).reshape(_CHUNK_ROWS, channels, queries)
                return (sampled * grad[None]).sum(1)

            along_x = dot_with_grad(tent_ref[point])
            grad_attention, grad_x, grad_y = sums[point]
            new_sums.append(
                (
                    grad_attention + tent_y * along_x,
                    grad_x + tent_y * dot_with_grad(slope_ref[point]),
                    grad_y + _tent_slope(distance) * along_x,
                )
            )
            weight = tent_y * attention
            spread = (weight[:, None] * grad[None]).reshape(_CHUNK_ROWS * channels, queries)
            map_gradient += _dot(spread.astype(tent_ref.dtype), tent_ref[point], ((1,), (1,)))
        grad_map_ref[0, chunk] += map_gradient
        return new_sums

    zeros = jnp.zeros((_CHUNK_ROWS, queries), jnp.float32)
    sums = lax.fori_loop(first_ref[block], last_ref[block], chunk_step, [(zeros,) * 3 for _ in range(points)])
    for point, (grad_attention, grad_x, grad_y) in enumerate(sums):
        attention = attention_ref[0, point : point + 1]
        grad_attention_ref[0, point : point + 1] = grad_attention.sum(0, keepdims=True)
        grad_x_ref[0, point : point + 1] = grad_x.sum(0, keepdims=True) * attention
        grad_y_ref[0, point : point + 1] = grad_y.sum(0, keepdims=True) * attention


def _level_call(kernel, maps, per_point, grad, out_shape, out_specs, scratch, chunk_range, interpret):
    rows, points, queries = per_point[0].shape
    point_spec = pl.BlockSpec((1, points, _QUERIES), lambda row, block, *_: (row, 0, block))
    # The map changes only with the head: a second buffer would waste VMEM.
    map_spec = pl.BlockSpec((1, *maps.shape[1:]), lambda row, block, *_: (row, 0, 0, 0), pipeline_mode=pl.Buffered(1))
    in_specs = [map_spec, *[point_spec] * len(per_point), *[_channel_spec(array.shape[1]) for array in grad]]
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(rows, queries // _QUERIES),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
    )(*chunk_range, maps, *per_point, *grad)


def _channel_spec(channels):
    return pl.BlockSpec((1, channels, _QUERIES), lambda row, block, *_: (row, 0, block))


def _sample_level(maps, x, y, attention, chunk_range, interpret):
    rows, points, queries = x.shape
    channels = maps.shape[2] // _CHUNK_ROWS
    return _level_call(
        _sample_kernel,
        maps,
        (x, y, attention),
        (),
        jax.ShapeDtypeStruct((rows, channels, queries), jnp.float32),
        _channel_spec(channels),
        [pltpu.VMEM((points, maps.shape[3], _QUERIES), maps.dtype)],
        chunk_range,
        interpret,
    )


def _pull_level(maps, x, y, attention, grad, chunk_range, interpret):
    rows, points, _ = x.shape
    point_spec = pl.BlockSpec((1, points, _QUERIES), lambda row, block, *_: (row, 0, block))
    map_spec = pl.BlockSpec((1, *maps.shape[1:]), lambda row, block, *_: (row, 0, 0, 0))
    tents = pltpu.VMEM((points, maps.shape[3], _QUERIES), maps.dtype)
    return _level_call(
        _pull_kernel,
        maps,
        (x, y, attention),
        (grad,),
        [jax.ShapeDtypeStruct(maps.shape, jnp.float32), *[jax.ShapeDtypeStruct(x.shape, jnp.float32)] * 3],
        [map_spec, point_spec, point_spec, point_spec],
        [tents, tents],
        chunk_range,
        interpret,
    )


def _round_up(size, multiple):
    return -(-size // multiple) * multiple
