"""Fixed sine encodings of image cells and of views (cropformer: decoder positions)."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

_TEMPERATURE = 10000.0
_EPSILON = 1e-6


def _encode(count: int, features: int, exponent_features: int) -> Float[Array, "n d"]:
    """Encodes 1..count, scaled to (0, 2*pi], as `features` interleaved sines and cosines."""
    angle = jnp.arange(1, count + 1, dtype=jnp.float32) / (count + _EPSILON) * (2 * math.pi)
    pair = jnp.arange(features) // 2
    wavelength = _TEMPERATURE ** (2 * pair / exponent_features)
    phase = angle[:, None] / wavelength
    return jnp.where(jnp.arange(features) % 2 == 0, jnp.sin(phase), jnp.cos(phase))


def sine_position(height: int, width: int, features: int) -> Float[Array, "h w c"]:
    """2-D encoding of a map's cells: the first half of the channels encodes y, the second x.

    Args:
        height, width: size of the map in cells.
        features: channels C, a multiple of 4.
    """
    half = features // 2
    y = _encode(height, half, half)[:, None, :]
    x = _encode(width, half, half)[None, :, :]
    shape = (height, width, half)
    return jnp.concatenate([jnp.broadcast_to(y, shape), jnp.broadcast_to(x, shape)], axis=-1)


def view_sine_position(views: int, height: int, width: int, features: int) -> Float[Array, "t h w c"]:
    """`sine_position` plus a term for the view index, added over all channels.

    The view term is scaled by the number of views, so it differs between training (2) and inference (5), as in the
    reference.
    """
    view = _encode(views, features, features)[:, None, None, :]
    return view + sine_position(height, width, features)
