"""Optimal assignment of predictions to targets, on the device."""

import jax
import jax.numpy as jnp
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

    # Integers: sums along augmenting paths are exact, so the optimum is one, and equal costs tie as in float64.
    scale = jnp.maximum(jnp.max(jnp.abs(cost), axis=(1, 2), keepdims=True), 1e-30)
    quantized = jnp.round(jax.lax.stop_gradient(cost) / scale * 2**25).astype(jnp.int32)
    query = jax.vmap(_assign)(quantized.swapaxes(1, 2), present_mn)
    matched = present_mn & (query < queries)
    return jnp.where(matched, query, 0), matched


_FAR = 2**30  # no path; 32 times the largest cost


def _assign(cost_rc: Int[Array, "r c"], present_r: Bool[Array, "r"]) -> Int[Array, "r"]:
    """Column of every present row at least total cost; rows <= columns.

    Shortest augmenting paths (Crouse, "On implementing 2D rectangular assignment algorithms", 2016), one row after the
    other. Columns are scanned in the order of `scipy.optimize.linear_sum_assignment`, so that ties fall the same way.
    Absent rows cost no time.
    """
    rows, columns = cost_rc.shape
    order = jnp.arange(columns)[::-1]

    def add_row(current, state):
        u, v, column_of, row_of = state

        def search(carry):
            distance, row, _, shortest, path, visited, seen, position, left = carry
            seen = seen.at[row].set(True)
            through = distance + cost_rc[row] - u[row] - v
            better = ~visited & (through < shortest)
            shortest, path = jnp.where(better, through, shortest), jnp.where(better, row, path)
            distance = jnp.min(jnp.where(visited, _FAR, shortest))
            tied = ~visited & (shortest == distance)
            free = tied & (row_of < 0)
            last_free = jnp.argmax(jnp.where(free, position, -1))
            column = jnp.where(jnp.any(free), last_free, jnp.argmin(jnp.where(tied, position, columns)))
            owner = row_of[column]
            visited = visited.at[column].set(True)
            # The last column of the scan takes the place of the one that leaves.
            position = jnp.where(position == left - 1, position[column], position).at[column].set(-1)
            sink = jnp.where(owner < 0, column, -1)
            return distance, jnp.where(owner < 0, row, owner), sink, shortest, path, visited, seen, position, left - 1

        start = (
            jnp.int32(0),
            jnp.int32(current),
            jnp.where(present_r[current], -1, 0),
            jnp.full(columns, _FAR, jnp.int32),
            jnp.full(columns, -1, jnp.int32),
            jnp.zeros(columns, bool),
            jnp.zeros(rows, bool),
            order.astype(jnp.int32),
            jnp.int32(columns),
        )
        found = jax.lax.while_loop(lambda carry: carry[2] < 0, search, start)
        distance, _, sink, shortest, path, visited, seen, *_ = found
        others = seen & (jnp.arange(rows) != current)
        u = u + jnp.where(others, distance - shortest[jnp.maximum(column_of, 0)], 0)
        u = u.at[current].add(jnp.where(present_r[current], distance, 0))
        v = v - jnp.where(visited, distance - shortest, 0)

        def augment(carry):
            column, column_of, row_of, _ = carry
            row = path[column]
            following = column_of[row]
            return following, column_of.at[row].set(column), row_of.at[column].set(row), row == current

        end = (sink.astype(jnp.int32), column_of, row_of, ~present_r[current])
        _, column_of, row_of, _ = jax.lax.while_loop(lambda carry: ~carry[3], augment, end)
        return u, v, column_of, row_of

    state = (
        jnp.zeros(rows, jnp.int32),
        jnp.zeros(columns, jnp.int32),
        jnp.full(rows, -1, jnp.int32),
        jnp.full(columns, -1, jnp.int32),
    )
    return jnp.maximum(jax.lax.fori_loop(0, rows, add_row, state)[2], 0)
