"""Assignment on the device against SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from scipy.optimize import linear_sum_assignment

from esg_jax.ops.matching import match

SOLVE = jax.jit(match)


def problems(items, queries, slots, counts, seed=0, scale=10.0):
    """Random costs, and targets scattered over the slots."""
    rng = np.random.default_rng(seed)
    cost = (rng.normal(size=(items, queries, slots)) * scale).astype(np.float32)
    present = np.zeros((items, slots), bool)
    for row, count in zip(present, counts, strict=True):
        row[rng.permutation(slots)[:count]] = True
    return cost, present


def check(cost, present):
    query, matched = (np.asarray(x) for x in SOLVE(cost, present))
    for item in range(len(cost)):
        slots = np.flatnonzero(present[item])
        rows, columns = linear_sum_assignment(cost[item][:, slots].astype(np.float64))
        best = cost[item][rows, slots[columns]].astype(np.float64).sum()
        chosen = np.flatnonzero(matched[item])
        assert set(chosen) <= set(slots) and len(chosen) == min(len(slots), cost.shape[1])
        assert len(set(query[item, chosen])) == len(chosen), "a query has two targets"
        assert np.all(query[item, ~matched[item]] == 0)
        np.testing.assert_allclose(cost[item][query[item, chosen], chosen].astype(np.float64).sum(), best, atol=1e-4)


@pytest.mark.parametrize("scale", [0.1, 10.0, 1000.0])
def test_fewer_targets_than_queries(scale):
    check(*problems(6, 12, 9, [0, 1, 4, 9, 7, 2], scale=scale))


@pytest.mark.parametrize("scale", [0.1, 10.0, 1000.0])
def test_more_slots_or_targets_than_queries(scale):
    check(*problems(6, 5, 12, [0, 3, 5, 6, 12, 9], scale=scale))


def test_ties_give_a_valid_assignment():
    _, present = problems(3, 6, 8, [2, 6, 8])
    check(np.ones((3, 6, 8), np.float32), present)


def test_no_slots():
    query, matched = match(jnp.zeros((2, 5, 0)), jnp.zeros((2, 0), bool))
    assert query.shape == matched.shape == (2, 0)


def test_costs_that_are_no_numbers_are_avoided():
    cost, present = problems(1, 4, 3, [3])
    cost[0, 1], cost[0, 2, 0] = np.nan, np.inf
    query, matched = (np.asarray(x)[0] for x in SOLVE(cost, present))
    assert matched.all() and sorted(query) == [0, 2, 3]
    assert query[0] != 2
    query, matched = SOLVE(np.full_like(cost, np.nan), present)
    assert np.all(matched) and sorted(np.asarray(query)[0]) == sorted(set(np.asarray(query)[0].tolist()))


def test_sharded_over_devices_without_communication():
    cost, present = problems(8, 6, 5, [1, 2, 3, 4, 5, 0, 2, 5])
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.jit(jax.shard_map(match, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False))
    for ours, whole in zip(sharded(cost, present), SOLVE(cost, present), strict=True):
        np.testing.assert_array_equal(ours, whole)
    text = sharded.lower(cost, present).compile().as_text()
    assert "all-reduce" not in text and "all-gather" not in text
