"""The step on a toy model: devices, accumulation, averages, tree mode."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from jax.sharding import PartitionSpec as P

from esg_jax import sharding
from esg_jax.train.optim import OptimConfig
from esg_jax.train.step import map_images


def run(step, num_steps=5, batch_size=8):
    state, losses = step.init(), []
    for number in range(num_steps):
        batch = sharding.put_batch(toy.toy_batch(number, batch_size), step.mesh)
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return state, np.array(losses)


def test_the_loss_falls(make_step):
    step = make_step(optim=OptimConfig(learning_rate=0.05, clip_norm=1.0, schedule="constant", weight_decay=0.0))
    state, batch, losses = step.init(), toy.toy_batch(0), []
    for _ in range(60):
        state, metrics = step(state, sharding.put_batch(batch, step.mesh))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.2 * losses[0]


def test_eight_devices_equal_one(make_step):
    rules = ((r"(kernel)$", P("fsdp", "model")), (r"", P()))
    state_1, losses_1 = run(make_step())
    step_8 = make_step(devices=8, model=2, rules=rules)
    state_8, losses_8 = run(step_8)
    assert state_8.params["mlp.0.kernel"].sharding.spec == P("fsdp", "model")
    assert state_8.opt_state[0].mu["mlp.0.kernel"].sharding.spec == P("fsdp", "model")
    np.testing.assert_allclose(losses_8, losses_1, rtol=0, atol=1e-5)
    for name, value in state_1.params.items():
        np.testing.assert_allclose(state_8.params[name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("devices", [1, 4])
def test_accumulation_equals_the_big_batch(make_step, devices):
    big, losses_big = run(make_step(devices=devices))
    small, losses_small = run(make_step(devices=devices, accumulate=2))
    np.testing.assert_allclose(losses_small, losses_big, rtol=0, atol=1e-6)
    for name, value in big.params.items():
        np.testing.assert_allclose(small.params[name], value, rtol=0, atol=1e-6)


def test_accumulation_must_divide_the_batch(make_step):
    step = make_step(accumulate=3)
    with pytest.raises(ValueError, match="batch size 8 is not a multiple of accumulate = 3"):
        step(step.init(), sharding.put_batch(toy.toy_batch(0), step.mesh))


def test_average_weights_follow_the_definition(toy_step):
    state = toy_step.init()
    expected = {name: np.asarray(value) for name, value in state.params.items()}
    for number in range(3):
        state, _ = toy_step(state, sharding.put_batch(toy.toy_batch(number), toy_step.mesh))
        expected = {name: 0.9 * old + 0.1 * np.asarray(state.params[name]) for name, old in expected.items()}
    for name, value in expected.items():
        np.testing.assert_allclose(state.ema[name], value, rtol=0, atol=1e-6)
    assert set(state.weights(average=True)) == set(toy_step.model.params) | set(toy_step.model.constants)


def test_no_average_weights_is_an_error(make_step):
    with pytest.raises(ValueError, match="ema_decay"):
        make_step().init().weights(average=True)


def test_non_finite_step_changes_only_the_counters(toy_step):
    state = toy_step.init()
    before = jax.tree.map(np.asarray, (state.params, state.opt_state, state.ema))
    bad = toy.toy_batch(0)
    bad["target"][3, 1] = np.nan
    state, metrics = toy_step(state, sharding.put_batch(bad, toy_step.mesh))
    assert np.isnan(metrics["loss"]) and int(state.bad_steps) == 1 and int(state.step) == 1
    after = jax.tree.map(np.asarray, (state.params, state.opt_state, state.ema))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    state, metrics = toy_step(state, sharding.put_batch(toy.toy_batch(1), toy_step.mesh))
    assert np.isfinite(metrics["loss"]) and int(state.bad_steps) == 0


def test_constants_get_no_gradient_and_no_decay(toy_step):
    state, _ = toy_step(toy_step.init(), sharding.put_batch(toy.toy_batch(0), toy_step.mesh))
    assert set(state.constants) == {"scale"}
    assert float(state.constants["scale"]) == 2.0


def test_given_weights_replace_random_ones(toy_step):
    kernel = np.full((16, 16), 0.5, np.float32)
    state = toy_step.init({"mlp.0.kernel": kernel})
    np.testing.assert_array_equal(state.params["mlp.0.kernel"], kernel)
    np.testing.assert_array_equal(state.ema["mlp.0.kernel"], kernel)
    with pytest.raises(ValueError, match="'mlp.7.kernel' does not belong"):
        toy_step.init({"mlp.7.kernel": kernel})
    with pytest.raises(ValueError, match=r"shape \(2, 2\), the model needs \(16, 16\)"):
        toy_step.init({"mlp.0.kernel": np.zeros((2, 2))})


def test_one_compilation_for_a_run(make_step):
    step = make_step()
    run(step, num_steps=3)
    assert step._compiled._cache_size() == 1


def test_another_run_is_the_same_program(make_step):
    """Length, rates and seed are arguments, so that the cache of compiled programs serves every run."""
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in toy.toy_batch(0).items()}
    first, second = (
        make_step(),
        make_step(
            total_steps=77,
            seed=5,
            optim=OptimConfig(learning_rate=3e-4, clip_norm=1.0, schedule="step", warmup_steps=9),
        ),
    )
    assert first.lower(batch).as_text() == second.lower(batch).as_text()
    other = make_step(optim=OptimConfig(learning_rate=1e-2, clip_norm=0.5)).lower(batch)
    assert other.as_text() != first.lower(batch).as_text()  # what is part of the program does show in its text
    _, losses = run(first, num_steps=2)
    _, other_losses = run(second, num_steps=2)
    assert losses[0] != other_losses[0]  # another seed draws other noise


def test_lowering_needs_no_arrays(make_step):
    step = make_step(devices=8, model=2)
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in toy.toy_batch(0).items()}
    compiled = step.lower(batch).compile()
    assert "all-reduce" in compiled.as_text()


_TREE_MODE = """
import sys
sys.path.insert(0, sys.argv[1])
import jax, toy
from esg_jax.train.optim import OptimConfig
from esg_jax.train.step import map_images
from esg_jax.sharding import make_mesh, put_batch
from esg_jax.train.step import TrainStep
step = TrainStep(toy.toy_model(), toy.ToyTask(), optim=OptimConfig(learning_rate=1e-2, clip_norm=1.0),
                 total_steps=20, mesh=make_mesh(1, -1, 1, devices=jax.devices()[:1]))
state = step.init()
for number in range(2):
    state, metrics = step(state, put_batch(toy.toy_batch(number), step.mesh))
    print(float(metrics["loss"]).hex())
"""


@pytest.mark.slow
def test_tree_mode_gives_the_same_losses(make_step):
    env = os.environ | {"NNX_GRAPH_MODE": "false", "NNX_GRAPH_UPDATES": "false"}
    folder = os.path.dirname(toy.__file__)
    result = subprocess.run(
        [sys.executable, "-c", _TREE_MODE, folder], env=env, capture_output=True, text=True, check=True
    )
    _, losses = run(make_step(), num_steps=2)
    assert result.stdout.split() == [float(loss).hex() for loss in losses]


@pytest.mark.parametrize("shape", [(2, 4, 1), (2, 2, 2)])
def test_mapping_over_images_sums_and_keeps_gradients(shape):
    mesh = sharding.make_mesh(*shape)
    x = jnp.arange(24.0).reshape(8, 3)

    def total(x, scale):
        return jnp.sum(x**2) * scale

    mapped = map_images(total, mesh, (sharding.BATCH_SPEC, P()))
    value, grads = jax.jit(jax.value_and_grad(mapped, argnums=(0, 1)))(x, 3.0)
    expected, expected_grads = jax.value_and_grad(total, argnums=(0, 1))(x, 3.0)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(grads[0], expected_grads[0], rtol=1e-6)
    np.testing.assert_allclose(grads[1], expected_grads[1], rtol=1e-6)
