"""Optimal assignment of predictions to targets, on the device."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int


def match(
    cost_mqn: Float[Array, "m q n"], present_mn: Bool[Array, "m n"]
) -> tuple[Int[Array, "m n"], Bool[Array, "m n"]]:
    """Hungarian matching of M independent problems with N padded targets each.

    Absent targets get a constant cost of 0: a constant column cannot change the optimum, whereas large paddings lose
    digits of float32 (1e6 already gives wrong matches). If there are more targets than queries, the best Q of them are
    matched.

    Args:
        cost_mqn: costs; those that are not finite count as worse than any sum of others.
        present_mn: which target slots hold a target.

    Returns:
        query: index of the query matched to each target slot; 0 where unmatched.
        matched: whether the slot holds a target that has a query.
    """
    _, queries, targets = cost_mqn.shape
    if targets == 0:
        return jnp.zeros((len(cost_mqn), 0), jnp.int32), jnp.zeros((len(cost_mqn), 0), bool)
    cost = jnp.where(present_mn[:, None, :], cost_mqn.astype(jnp.float32), 0.0)
    finite = jnp.isfinite(cost)
    largest = jnp.max(jnp.where(finite, jnp.abs(cost), 0.0), axis=(1, 2), keepdims=True)
    cost = jnp.where(finite, cost, 2 * targets * (largest + 1))
    # A square problem has as many dummy queries as it lacks; they must be dearer for real targets than real queries,
    # but not by much: large numbers cost digits of float32.
    if queries < targets:
        dearer = jnp.max(cost, axis=(1, 2), keepdims=True) + 1
        padding = jnp.broadcast_to(dearer, (len(cost), targets - queries, targets))
        cost = jnp.concatenate([cost, jnp.where(present_mn[:, None, :], padding, 0.0)], axis=1)

    def solve(cost_qn):
        # Targets as rows: they are assigned one after the other, as SciPy does, so that ties fall the same way.
        target, query = optax.assignment.hungarian_algorithm(cost_qn.T)
        return jnp.zeros(targets, jnp.int32).at[target].set(query.astype(jnp.int32))

    query = jax.vmap(solve)(jax.lax.stop_gradient(cost))
    matched = present_mn & (query < queries)
    return jnp.where(matched, query, 0), matched
