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
    other. Columns are scanned in the order of `scipy.optimize.linear_sum_assignment`, so that ties fall the same way
    while targets are fewer than queries. SciPy, given queries as rows, exchanges rows and columns only then; where
    targets are at least as many, tied costs may give other pairs of the same total. Absent rows cost no time.
    """
    rows, columns = cost_rc.shape
    row_index, column_index = jnp.arange(rows), jnp.arange(columns)

    def add_row(current, state):
        u, v, column_of, row_of = state

        # Every array that a loop carries is a kernel, so few are: `position` is the place in the scan, -1 for visited
        # columns; the numbers are the distance, the row to go on from, the column found or -1, and how many are left.
        def search(carry):
            numbers, shortest, path, position = carry
            distance, row, _, left = numbers
            through = distance + cost_rc[row] - u[row] - v
            better = (position >= 0) & (through < shortest)
            shortest, path = jnp.where(better, through, shortest), jnp.where(better, row, path)
            distance = jnp.min(jnp.where(position >= 0, shortest, _FAR))
            # Of the nearest columns the last free one of the scan, or else the first.
            rank = jnp.where(row_of < 0, columns + position, columns - 1 - position)
            column = jnp.argmax(jnp.where((position >= 0) & (shortest == distance), rank, -1))
            owner = row_of[column]
            # The last column of the scan takes the place of the one that leaves.
            moved = jnp.where(position == left - 1, position[column], position)
            position = jnp.where(column_index == column, -1, moved)
            found = owner < 0
            numbers = jnp.stack([distance, jnp.where(found, row, owner), jnp.where(found, column, -1), left - 1])
            return numbers, shortest, path, position

        start = (
            jnp.stack([0, current, jnp.where(present_r[current], -1, 0), columns]).astype(jnp.int32),
            jnp.full(columns, _FAR, jnp.int32),
            jnp.full(columns, -1, jnp.int32),
            column_index[::-1].astype(jnp.int32),
        )
        numbers, shortest, path, position = jax.lax.while_loop(lambda carry: carry[0][2] < 0, search, start)
        distance, _, sink, _ = numbers
        # Rows were reached through their columns, the current one from the start.
        nearer = jnp.where(position < 0, distance - shortest, 0)
        u = u + jnp.where(column_of >= 0, nearer[jnp.maximum(column_of, 0)], 0)
        u = u + jnp.where((row_index == current) & present_r[current], distance, 0)
        v = v - nearer

        def augment(carry):
            column, column_of, row_of, _ = carry
            row = path[column]
            following = column_of[row]
            column_of = jnp.where(row_index == row, column, column_of)
            return following, column_of, jnp.where(column_index == column, row, row_of), row == current

        end = (sink, column_of, row_of, ~present_r[current])
        _, column_of, row_of, _ = jax.lax.while_loop(lambda carry: ~carry[3], augment, end)
        return u, v, column_of, row_of

    state = (
        jnp.zeros(rows, jnp.int32),
        jnp.zeros(columns, jnp.int32),
        jnp.full(rows, -1, jnp.int32),
        jnp.full(columns, -1, jnp.int32),
    )
    return jnp.maximum(jax.lax.fori_loop(0, rows, add_row, state)[2], 0)
