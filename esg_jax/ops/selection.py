"""Order statistics without sorting."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def kth_smallest(x: Float[Array, "*b n"], k: int) -> Float[Array, "*b 1"]:
    """The k-th smallest value of each row of non-negative float32 numbers, exactly.

    Bisects over bit patterns, whose order is that of non-negative floats: 31 passes of compare and count, several
    times faster than `jax.lax.top_k` for hundreds of values out of thousands.

    Args:
        x: non-negative, no NaN.
        k: 1 for the minimum, at most the length of a row.

    Raises:
        ValueError: k is out of range.
    """
    if not 1 <= k <= x.shape[-1]:
        raise ValueError(f"k must be between 1 and {x.shape[-1]}, got {k}")
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)

    def narrow(_, bounds):
        low, high = bounds  # at least k values are <= high, fewer than k are < low
        middle = low + (high - low) // 2
        enough = jnp.sum(bits <= middle, axis=-1, keepdims=True) >= k
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    low = jnp.zeros((*x.shape[:-1], 1), jnp.int32)
    high = jnp.full_like(low, 0x7F800000)  # infinity
    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 31, narrow, (low, high))[1], jnp.float32)
