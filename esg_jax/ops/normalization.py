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
    return _normalize(x, scale, bias, (-1,), epsilon)


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
    groups = x.reshape(batch, -1, num_groups, channels // num_groups)
    scale, bias = (value.reshape(num_groups, -1) for value in (scale, bias))
    return _normalize(groups, scale, bias, (-3, -1), epsilon).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _normalize(x, scale, bias, axes, epsilon):
    return _forward(x, scale, bias, axes, epsilon)[0]


def _forward(x, scale, bias, axes, epsilon):
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axes, keepdims=True)
    centred = wide - mean
    factor = jax.lax.rsqrt(jnp.mean(centred * centred, axes, keepdims=True) + epsilon)
    y = centred * factor * scale.astype(jnp.float32) + bias.astype(jnp.float32)
    return y.astype(x.dtype), (x, mean, factor, scale, bias)


def _backward(axes, epsilon, residuals, gradient):
    x, mean, factor, scale, bias = residuals
    wide = gradient.astype(jnp.float32)
    normal = (x.astype(jnp.float32) - mean) * factor
    slope = wide * scale.astype(jnp.float32)
    inner = slope - jnp.mean(slope, axes, keepdims=True) - normal * jnp.mean(slope * normal, axes, keepdims=True)
    others = tuple(range(x.ndim - scale.ndim))
    grad_scale = jnp.sum(wide * normal, others).astype(scale.dtype)
    return (inner * factor).astype(x.dtype), grad_scale, jnp.sum(wide, others).astype(bias.dtype)


_normalize.defvjp(_forward, _backward)
