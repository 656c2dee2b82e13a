"""Schedules, clipping and AdamW against PyTorch's arithmetic written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esg_jax.train.optim import OptimConfig, clip_by_norm, make_optimizer, make_schedule


def test_poly_schedule():
    schedule = make_schedule(OptimConfig(learning_rate=1e-4), 1000)
    for step in (0, 1, 500, 999):
        np.testing.assert_allclose(schedule(jnp.int32(step)), 1e-4 * (1 - step / 1000) ** 0.9, rtol=1e-5)
    assert float(schedule(jnp.int32(1000))) == 0.0
    assert float(schedule(jnp.int32(1500))) == 0.0  # not NaN from a negative base


def test_step_schedule_of_the_paper():
    total = 103_125
    config = OptimConfig(learning_rate=2e-4, schedule="step", milestones=(91_575 / total, 99_414 / total))
    schedule = make_schedule(config, total)
    for step, factor in ((0, 1), (91_574, 1), (91_575, 0.1), (99_413, 0.1), (99_414, 0.01), (total, 0.01)):
        np.testing.assert_allclose(schedule(jnp.int32(step)), 2e-4 * factor, rtol=1e-5)


def test_warmup_is_linear_and_reaches_the_schedule():
    schedule = make_schedule(OptimConfig(learning_rate=1.0, schedule="constant", warmup_steps=4), 100)
    np.testing.assert_allclose([float(schedule(jnp.int32(step))) for step in range(6)], [0.25, 0.5, 0.75, 1, 1, 1])


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="optim.schedule is 'cosin'"):
        OptimConfig(schedule="cosin")


def test_clipping():
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
    clipped, norm = clip_by_norm(grads, 0.01)
    assert float(norm) == 5.0
    np.testing.assert_allclose(clipped["b"], [[4.0 * 0.01 / (5.0 + 1e-6)]], rtol=1e-6)
    unchanged, _ = clip_by_norm(grads, 10.0)
    np.testing.assert_array_equal(unchanged["a"], grads["a"])


def test_norm_of_a_divided_and_of_large_gradients():
    """However the arrays are joined, the norm is that of all of them."""
    rng = np.random.default_rng(0)
    shapes = {"small": (7, 5), "other": (3,), "scalar": (), "large": (600, 500), "divided": (8, 8)}
    grads = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    expected = np.sqrt(sum(np.sum(np.square(grad.astype(np.float64))) for grad in grads.values()))
    for split in ((), ("divided",), tuple(shapes)):
        _, norm = clip_by_norm(jax.tree.map(jnp.asarray, grads), 1.0, split=split)
        np.testing.assert_allclose(norm, expected, rtol=1e-6)


def test_adamw_is_torch_adamw():
    """p <- p (1 - lr wd); then the bias-corrected Adam step, eps outside the square root."""
    config, rate = OptimConfig(weight_decay=0.05), 1e-2
    rng = np.random.default_rng(0)
    weight, m, v = rng.normal(size=5), np.zeros(5), np.zeros(5)
    optimizer = make_optimizer(config)
    params = {"fc.kernel": jnp.asarray(weight, jnp.float32)}
    state = optimizer.init(params)
    for count in range(1, 4):
        grad = rng.normal(size=5)
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        weight = weight * (1 - rate * 0.05)
        weight -= rate * (m / (1 - 0.9**count)) / (np.sqrt(v / (1 - 0.999**count)) + 1e-8)
        direction, state = optimizer.update({"fc.kernel": jnp.asarray(grad, jnp.float32)}, state, params)
        params = {"fc.kernel": params["fc.kernel"] - rate * direction["fc.kernel"]}
        np.testing.assert_allclose(params["fc.kernel"], weight, rtol=0, atol=1e-6)
