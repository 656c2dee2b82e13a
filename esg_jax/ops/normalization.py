"""Layer and group normalisation whose backward passes keep nothing but their input and its statistics.

Automatic differentiation would keep the centred and the scaled input as well. Statistics are float32, with the two-pass
variance, as PyTorch's are.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def layer_norm(
    x: Float[Array, "*b c"], scale: Float[Array, "c"], bias: Float[Array, "c"], epsilon: float
) -> Float[Array, "*b c"]:
    """``(x - mean) / sqrt(var + epsilon) * scale + bias`` over the last axis.

    Args:
        x: any floating-point type, which is that of the result.
        scale, bias: per channel.
        epsilon: added to the variance.
    """
    rows = _normalize(x.reshape(-1, 1, 1, x.shape[-1]), scale, bias, epsilon)
    return rows.reshape(x.shape)


def group_norm(
    x: Float[Array, "b *s c"], scale: Float[Array, "c"], bias: Float[Array, "c"], num_groups: int, epsilon: float
) -> Float[Array, "b *s c"]:
    """The same over all positions and the channels of a group.

    Raises:
        ValueError: the channels do not divide into groups.
    """
    batch, channels = x.shape[0], x.shape[-1]
    if channels % num_groups:
        raise ValueError(f"{channels} channels do not divide into {num_groups} groups")
    groups = _normalize(x.reshape(batch, -1, num_groups, channels // num_groups), scale, bias, epsilon)
    return groups.reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalize(x_bsgc, scale, bias, epsilon):
    return _forward(x_bsgc, scale, bias, epsilon)[0]


def _mean(x_bsgc):
    return jnp.mean(x_bsgc, axis=(1, 3), keepdims=True)


def _forward(x_bsgc, scale, bias, epsilon):
    wide, shape = x_bsgc.astype(jnp.float32), (x_bsgc.shape[2], -1)
    mean = _mean(wide)
    centred = wide - mean
    factor = jax.lax.rsqrt(_mean(centred * centred) + epsilon)
    y = centred * (factor * scale.reshape(shape).astype(jnp.float32)) + bias.reshape(shape).astype(jnp.float32)
    return y.astype(x_bsgc.dtype), (x_bsgc, mean, factor, scale, bias)


def _backward(epsilon, residuals, gradient):
    x_bsgc, mean, factor, scale, bias = residuals
    wide = gradient.astype(jnp.float32)
    normal = (x_bsgc.astype(jnp.float32) - mean) * factor
    slope = wide * scale.reshape(x_bsgc.shape[2], -1).astype(jnp.float32)
    inner = slope - _mean(slope) - normal * _mean(slope * normal)
    grad_scale, grad_bias = (
        jnp.sum(value, axis=(0, 1)).reshape(old.shape).astype(old.dtype)
        for value, old in ((wide * normal, scale), (wide, bias))
    )
    return (inner * factor).astype(x_bsgc.dtype), grad_scale, grad_bias


_normalize.defvjp(_forward, _backward)
