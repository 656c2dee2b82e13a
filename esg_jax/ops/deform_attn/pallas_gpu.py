"""Multi-scale deformable attention on NVIDIA GPUs of compute capability 9.0 or higher: Pallas, Mosaic GPU lowering.

Mosaic GPU programs a warpgroup (128 threads) as one unit: it loads slices at computed offsets, but cannot index with an
array of offsets. The four corners of a sample are such a slice, 2 x 2 pixels of one head, so a warpgroup takes one
sample after the other: each warp reads one corner, each lane a channel. Maps have a border of zeros, which is what
samples outside read. The four warps keep a sum each; shared memory adds them once per block of queries.

Forward pass only: its gradients are computed by XLA. docs/kernels.md says what Mosaic GPU lacks for more.
"""

import math

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl

from esg_jax.ops.deform_attn.xla import Shapes, level_starts

# Queries per block: enough to hide a block's start, few enough for many blocks on a small decoder.
_QUERIES = 8
_WARP = 32
_CHANNELS = (32, 64, 128)


def unsupported(values_shape, values_dtype, shapes: Shapes, weights_shape) -> str | None:
    """Why these arguments do not fit the kernel, or None."""
    if values_dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"values are {values_dtype}, but the Mosaic GPU kernel takes float32, bfloat16 or float16"
    batch, _, heads, channels = values_shape
    if channels not in _CHANNELS:
        return f"{channels} channels per head, but the Mosaic GPU kernel takes {', '.join(map(str, _CHANNELS))}"
    largest = max((batch * heads * channels * (height + 2) * (width + 2) for height, width in shapes), default=0)
    if max(largest, 2 * math.prod(weights_shape)) >= 2**31:
        return "an array of 2**31 elements or more"
    return None


def missing() -> str | None:
    """Why this process's GPU cannot run the kernel, or None. Without a GPU, only lowering for one makes sense."""
    if jax.default_backend() != "gpu":
        return None
    capability = jax.devices()[0].compute_capability
    if float(capability) < 9:
        return f"Mosaic GPU needs compute capability 9.0 (H100), this GPU has {capability}"
    return None


def forward(values_bshd, shapes: Shapes, locations_bqhlp2, weights_bqhlp, *, interpret: bool = False):
    """Output (B, Q, H*D) in the dtype of the values. `interpret` runs on any platform, one callback per load."""
    # Imported on use: the module is large, and only this implementation needs it.
    from jax.experimental.pallas import mosaic_gpu as plgpu

    batch, _, heads, channels = values_bshd.shape
    queries, points = locations_bqhlp2.shape[1], locations_bqhlp2.shape[4]
    padding = [(0, 0), (0, max(0, _QUERIES - queries)), (0, 0), (0, 0), (0, 0), (0, 0)]
    locations, weights = jnp.pad(locations_bqhlp2, padding), jnp.pad(weights_bqhlp, padding[:-1])
    total = locations.shape[1]
    corners = (2, 2, channels)
    # The layout that loads of `corners` get: a thread holds up to 8 neighbouring bytes.
    vector = min(channels // _WARP, 8 // values_bshd.dtype.itemsize)
    layout = plgpu.Layout.WG_STRIDED(corners, vec_size=vector)

    def is_first(axis):
        index = lax.broadcasted_iota(jnp.int32, corners, axis)
        return (index if interpret else plgpu.layout_cast(index, layout)) == 0  # the interpreter knows no layouts

    def kernel(locations_ref, weights_ref, *refs):
        *maps, out_ref, sums_ref = refs
        image, head = lax.axis_index("batch"), lax.axis_index("head")
        # The last block overlaps its neighbour rather than the end, and writes the same values there.
        first = jnp.minimum(lax.axis_index("block") * _QUERIES, total - _QUERIES)
        top, left = is_first(0), is_first(1)

        def sample(query, level, point):
            def taps(axis, size):
                at = image, query, head, level, point, axis
                # In pixels of the bordered map, and inside it: truncation then is floor, and far samples read zeros.
                pixel = jnp.clip(locations_ref[at] * float(size) + 0.5, 0.0, size + 1.0)
                low = jnp.minimum(pixel.astype(jnp.int32), size)
                return low, pixel - low.astype(jnp.float32)

            height, width = shapes[level]
            (x, x_fraction), (y, y_fraction) = taps(0, width), taps(1, height)
            weight = weights_ref[image, query, head, level, point]
            values = maps[level][image, pl.ds(y, 2), pl.ds(x, 2), head, :].astype(jnp.float32)
            coefficient = jnp.where(top, (1.0 - y_fraction) * weight, y_fraction * weight)
            return values * (coefficient * jnp.where(left, 1.0 - x_fraction, x_fraction))

        def attend(index, _):
            # Unrolled, so that all samples of a query are being read at once.
            samples = [sample(first + index, level, point) for level in range(len(shapes)) for point in range(points)]
            sums_ref[:, :, index, :] = sum(samples[1:], samples[0])
            return ()

        lax.fori_loop(0, _QUERIES, attend, ())
        out = (sums_ref[0, 0] + sums_ref[0, 1]) + (sums_ref[1, 0] + sums_ref[1, 1])
        out_ref[image, pl.ds(first, _QUERIES), head, :] = out.astype(out_ref.dtype)

    out_bqhd = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((batch, total, heads, channels), values_bshd.dtype),
        scratch_types=[plgpu.SMEM((2, 2, _QUERIES, channels), jnp.float32)],
        # Blocks of one head follow each other: its maps then stay in the L2 cache.
        grid=(batch, heads, pl.cdiv(total, _QUERIES)),
        grid_names=("batch", "head", "block"),
        interpret=_interpreter() if interpret else None,
    )(locations, weights, *_bordered_maps(values_bshd, shapes))
    return out_bqhd[:, :queries].reshape(batch, queries, heads * channels)


def _bordered_maps(values_bshd, shapes):
    """Every level as (B, h+2, w+2, H, D) with a border of zeros."""
    maps = []
    for start, (height, width) in zip(level_starts(shapes), shapes, strict=True):
        level = values_bshd[:, start : start + height * width]
        level = level.reshape(level.shape[0], height, width, *level.shape[2:])
        maps.append(jnp.pad(level, ((0, 0), (1, 1), (1, 1), (0, 0), (0, 0))))
    return maps


def _interpreter():
    # Not exported under a public name by jax 0.10.
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()
