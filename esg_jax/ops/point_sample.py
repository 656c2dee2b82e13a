"""Bilinear sampling of maps at scattered points: zero outside, PyTorch's grid_sample with align_corners=False.

Points are (x, y) in [0, 1] of the map, so pixel centres lie at (i + 0.5) / size.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8


def _corners(points: Float[Array, "... p 2"], height: int, width: int):
    """Yields (flat index, weight) of the four cells around each point; weight 0 outside the map."""
    x = points[..., 0].astype(jnp.float32) * width - 0.5
    y = points[..., 1].astype(jnp.float32) * height - 0.5
    left, top = jnp.floor(x), jnp.floor(y)
    for dy in (0, 1):
        for dx in (0, 1):
            column, row = left + dx, top + dy
            weight = (1 - jnp.abs(x - column)) * (1 - jnp.abs(y - row))
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            column = jnp.clip(column, 0, width - 1).astype(jnp.int32)
            row = jnp.clip(row, 0, height - 1).astype(jnp.int32)
            yield row, column, jnp.where(inside, weight, 0.0)


def point_sample(maps: Float[Array, "*b h w"], points: Float[Array, "*b p 2"]) -> Float[Array, "*b p"]:
    """Values of each map at its own points.

    Args:
        maps: scalar maps.
        points: (x, y) in [0, 1]; leading dimensions equal those of `maps`.
    """
    height, width = maps.shape[-2:]
    flat = maps.reshape(*maps.shape[:-2], height * width)
    total = 0.0
    for row, column, weight in _corners(points, height, width):
        total += jnp.take_along_axis(flat, row * width + column, axis=-1) * weight.astype(maps.dtype)
    return total


def point_sample_features(maps: Float[Array, "*b h w c"], points: Float[Array, "*b p 2"]) -> Float[Array, "*b p c"]:
    """Feature vectors of each map at its own points; see `point_sample`."""
    *_, height, width, channels = maps.shape
    flat = maps.reshape(*maps.shape[:-3], height * width, channels)
    total = 0.0
    for row, column, weight in _corners(points, height, width):
        rows = jnp.take_along_axis(flat, (row * width + column)[..., None], axis=-2)
        total += rows * weight[..., None].astype(maps.dtype)
    return total


def point_sample_packed(masks: UInt8[Array, "*b h w8"], points: Float[Array, "*b p 2"]) -> Float[Array, "*b p"]:
    """Values of binary masks that are stored as bits, eight columns to a byte.

    The masks stay packed: only the four bits around each point are read.

    Args:
        masks: `numpy.packbits(mask, axis=-1)`, so the first column is the highest bit.
        points: (x, y) in [0, 1]; leading dimensions equal those of `masks`.
    """
    height, bytes_per_row = masks.shape[-2:]
    flat = masks.reshape(*masks.shape[:-2], height * bytes_per_row)
    total = 0.0
    for row, column, weight in _corners(points, height, bytes_per_row * 8):
        byte = jnp.take_along_axis(flat, row * bytes_per_row + column // 8, axis=-1)
        bit = (byte >> (7 - column % 8).astype(jnp.uint8)) & 1
        total += bit.astype(jnp.float32) * weight
    return total
