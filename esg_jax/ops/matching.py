"""Optimal assignment of predictions to targets, on the device."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

# Stands for a cost that is not a number: larger than any real one, small enough to keep float32 exact elsewhere.
_WORST = 1e4


def match(
    cost_mqn: Float[Array, "m q n"], present_mn: Bool[Array, "m n"]
) -> tuple[Int[Array, "m n"], Bool[Array, "m n"]]:
    """Hungarian matching of M independent problems with N padded targets each.

    Absent targets get a constant cost of 0: a constant column cannot change the optimum, whereas large paddings lose
    digits of float32 (1e6 already gives wrong matches). If there are more targets than queries, the best Q of them are
    matched.

    Args:
        cost_mqn: finite costs; others count as very bad.
        present_mn: which target slots hold a target.

    Returns:
        query: index of the query matched to each target slot; 0 where unmatched.
        matched: whether the slot holds a target that has a query.
    """
    _, queries, targets = cost_mqn.shape
    if targets == 0:
        return jnp.zeros((len(cost_mqn), 0), jnp.int32), jnp.zeros((len(cost_mqn), 0), bool)
    cost = jnp.nan_to_num(cost_mqn.astype(jnp.float32), nan=_WORST, posinf=_WORST, neginf=-_WORST)
    # A square problem has as many dummy queries as it lacks; they must stay dearer for real targets than real queries.
    if queries < targets:
        padding = jnp.full((len(cost), targets - queries, targets), _WORST, jnp.float32)
        cost = jnp.concatenate([cost, padding], axis=1)
    cost = jnp.where(present_mn[:, None, :], cost, 0.0)

    def solve(cost_qn):
        rows, columns = optax.assignment.hungarian_algorithm(cost_qn)
        return jnp.zeros(targets, jnp.int32).at[columns].set(rows.astype(jnp.int32))

    query = jax.vmap(solve)(jax.lax.stop_gradient(cost))
    matched = present_mn & (query < queries)
    return jnp.where(matched, query, 0), matched
