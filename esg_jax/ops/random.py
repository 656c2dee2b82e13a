"""Cheap random numbers: a hash of (key, counter) instead of a cipher per number.

JAX's threefry is made for few numbers of high quality; for millions of sampling points it dominates the time to compile
and to run. The finaliser of MurmurHash3 mixes every bit of its input into every bit of its output.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key


def uniform(
    keys: Key[Array, "*b"], shape: tuple[int, ...], start: Int[Array, ""] | int = 0
) -> Float[Array, "*b {shape}"]:
    """Independent float32 numbers in [0, 1) for every key; multiples of 2^-24.

    Args:
        keys: typed PRNG keys.
        shape: of the numbers of one key.
        start: number of the first one in the key's stream of 2^32: draws from disjoint parts are independent.
    """
    words = jax.random.key_data(keys)
    counter = jax.lax.iota(jnp.uint32, int(np.prod(shape))).reshape(shape) + jnp.asarray(start).astype(jnp.uint32)
    first, last = (words[..., i].reshape(*keys.shape, *[1] * len(shape)) for i in (0, -1))
    # A second round with the other word: streams of two keys are no shifted copies of each other.
    bits = _mix(_mix(counter * jnp.uint32(0x9E3779B9) ^ first) + last)
    return (bits >> 8).astype(jnp.float32) * jnp.float32(2**-24)


def _mix(x: Array) -> Array:
    """Finaliser of MurmurHash3 (Appleby), a bijection of 32 bits."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
