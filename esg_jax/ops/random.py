"""Uniform random numbers for many keys at once, in parts that do not depend on each other."""

import jax
from jaxtyping import Array, Float, Int, Key


def uniform(
    keys: Key[Array, "*b"], shape: tuple[int, ...], part: Int[Array, ""] | int = 0
) -> Float[Array, "*b {shape}"]:
    """Independent float32 numbers in [0, 1) for every key.

    Args:
        keys: typed PRNG keys.
        shape: of the numbers of one key.
        part: number of the draw; those of different parts are independent.
    """
    draw = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, part), shape))
    return draw(keys.reshape(-1)).reshape(*keys.shape, *shape)
