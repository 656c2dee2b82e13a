"""Bilinear resizing with PyTorch's convention: align_corners=False, no antialiasing, also when shrinking."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def bilinear_taps(size_in: int, size_out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two source cells of every output cell along one axis, and the weight of the second.

    Coordinates are rounded to float32 as PyTorch's are: a float32 scale, then one fused multiply-add.

    Returns:
        low, high: int32 (size_out,) indices.
        weight: float32 (size_out,); output = (1 - weight) * x[low] + weight * x[high].

    Raises:
        ValueError: a size is not positive.
    """
    if size_in < 1 or size_out < 1:
        raise ValueError(f"cannot resize a side of {size_in} to {size_out}; both must be positive")
    scale = np.float32(size_in) / np.float32(size_out)
    source = np.maximum((np.arange(size_out) + 0.5) * np.float64(scale) - 0.5, 0).astype(np.float32)
    low = np.minimum(source.astype(np.int32), size_in - 1)
    return low, np.minimum(low + 1, size_in - 1), source - low.astype(np.float32)


def bilinear_matrix(size_in: int, size_out: int) -> np.ndarray:
    """The same as a float32 (size_out, size_in) matrix."""
    low, high, weight = bilinear_taps(size_in, size_out)
    matrix = np.zeros((size_out, size_in), np.float32)
    rows = np.arange(size_out)
    np.add.at(matrix, (rows, low), 1 - weight)
    np.add.at(matrix, (rows, high), weight)
    return matrix


def resize_bilinear(
    x: Float[Array, "..."], size: tuple[int, int], *, axes: tuple[int, int] = (-3, -2)
) -> Float[Array, "..."]:
    """Resizes two axes of `x` to `size`, as `torch.nn.functional.interpolate(mode="bilinear")` does.

    Args:
        x: floating-point array.
        size: static (height, width) of the result.
        axes: the axes of height and width; the default fits (..., h, w, c).

    Returns:
        Array of the same type, interpolated in float32. It has a reverse-mode derivative.

    Raises:
        ValueError: a side is not positive.
    """
    out = x.astype(jnp.float32)
    for axis, side in zip(axes, size, strict=True):
        if x.shape[axis] != side:
            out = _resize_axis(out, axis % x.ndim, int(side))
    return out.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _resize_axis(x, axis, side):
    return _apply(bilinear_matrix(x.shape[axis], side), x, axis)


def _forward(x, axis, side):
    return _resize_axis(x, axis, side), x.shape[axis]


def _backward(axis, side, size_in, gradient):
    # Left to autodiff, gathers would become scatters, slow on every backend.
    return (_apply(bilinear_matrix(size_in, side).T, gradient, axis),)


_resize_axis.defvjp(_forward, _backward)


def _apply(matrix, x, axis):
    """Multiplies one axis of `x` by a constant matrix with few entries per row."""
    return jax.lax.platform_dependent(
        x,
        cpu=functools.partial(_apply_sparse, matrix, axis=axis),
        default=functools.partial(_apply_dense, matrix, axis=axis),
    )


def _apply_sparse(matrix, x, axis):
    taps = int(np.count_nonzero(matrix, axis=1).max())
    if taps > 8:
        return _apply_dense(matrix, x, axis)
    columns = np.argsort(matrix == 0, axis=1, kind="stable")[:, :taps]
    weights = np.take_along_axis(matrix, columns, axis=1).reshape(-1, taps, *(1,) * (x.ndim - axis - 1))
    return sum(jnp.take(x, columns[:, tap], axis=axis) * weights[:, tap] for tap in range(taps))


def _apply_dense(matrix, x, axis):
    flat = x.reshape(math.prod(x.shape[:axis]), x.shape[axis], math.prod(x.shape[axis + 1 :]))
    # Weights rounded to bfloat16, the default of matrix units, would move the samples.
    flat = jnp.einsum("oi,aib->aob", matrix, flat, precision="highest")
    return flat.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])
