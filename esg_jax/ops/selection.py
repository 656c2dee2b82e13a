"""Order statistics without sorting."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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


_BLOCK = 128


def smallest(x: Float[Array, "*b n"], k: int) -> Int[Array, "*b k"]:
    """Indices of the k smallest values of each row of non-negative float32 numbers, in increasing order of index.

    Of more than k values up to the k-th smallest, which takes equal ones, the first k in order of index are taken.

    Raises:
        ValueError: k is out of range.
    """
    count = x.shape[-1]
    chosen = x <= kth_smallest(x, k)
    # Rank of each chosen one: sums inside blocks and over blocks as matrix products, exact in float32 of any precision
    # for numbers up to 256 in a block and accumulated in float32.
    blocks = -(-count // _BLOCK)
    bits = jnp.pad(chosen, [(0, 0)] * (x.ndim - 1) + [(0, blocks * _BLOCK - count)])
    bits = bits.reshape(*x.shape[:-1], blocks, _BLOCK).astype(jnp.float32)
    inside = bits @ jnp.triu(jnp.ones((_BLOCK, _BLOCK)))
    before = inside[..., -1] @ jnp.triu(jnp.ones((blocks, blocks)), 1)
    rank = (inside + before[..., None] - 1).reshape(*x.shape[:-1], -1)[..., :count].astype(jnp.int32)
    rows = jnp.where(chosen, rank, k).reshape(-1, count)  # out of bounds, which is dropped
    out = jnp.zeros((len(rows), k), jnp.int32)
    indices = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), rows.shape)
    out = out.at[jnp.arange(len(rows))[:, None], rows].set(indices, mode="drop")
    return out.reshape(*x.shape[:-1], k)
