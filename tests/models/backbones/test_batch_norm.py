"""Batch normalisation with statistics of the batch: what it computes, and who keeps the running averages."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from esg_jax.models.backbones.frozen_norm import (
    BatchNorm,
    FrozenBatchNorm,
    FrozenStat,
    running_statistics,
    use_batch_statistics,
)
from esg_jax.models.backbones.mobilenet_v2 import InvertedResidual, _run_block
from esg_jax.models.layers import remat
from esg_jax.sharding import BATCH_AXES, BATCH_SPEC, make_mesh
from esg_jax.train.optim import OptimConfig
from esg_jax.train.state import ModelDef
from esg_jax.train.step import STATISTICS, StepConfig, TrainStep

X = np.random.default_rng(0).normal(3.0, 2.0, (4, 5, 6, 8)).astype(np.float32)


def test_frozen_until_it_is_asked_for():
    norm, frozen = BatchNorm(8, train_affine=True), FrozenBatchNorm(8, train_affine=True)
    np.testing.assert_array_equal(norm(X), frozen(X))
    use_batch_statistics(norm)
    y = np.asarray(norm(X))
    np.testing.assert_allclose(y, (X - X.mean((0, 1, 2))) / np.sqrt(X.var((0, 1, 2)) + 1e-5), atol=1e-4)
    kept = running_statistics(norm)
    np.testing.assert_allclose(kept["mean"], X.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(kept["var"], X.var((0, 1, 2)), rtol=1e-4)
    use_batch_statistics(frozen)
    assert running_statistics(frozen) == {} and isinstance(norm.mean, FrozenStat)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_recomputed_block_gives_its_statistics_back(recompute):
    kwargs = dict(train_affine=True, batch_statistics=True, epsilon=1e-5, same_padding=False)
    block = InvertedResidual(8, 8, 2, 1, **kwargs, rngs=nnx.Rngs(0), dtype=jnp.float32, param_dtype=jnp.float32)
    graph, state = nnx.split(block)

    @jax.jit
    def run(state, x):
        def loss(x):
            block = nnx.merge(graph, state, copy=True)
            use_batch_statistics(block)
            y, statistics = remat(_run_block, recompute)(block, x)
            nnx.update(block, statistics)
            return jnp.sum(y**2), running_statistics(block)

        return jax.grad(loss, has_aux=True)(x)

    _, statistics = run(state, X)
    assert len(statistics) == 6
    middle = np.einsum("bhwc,cd->bhwd", X, block.expand.conv.kernel[0, 0])
    np.testing.assert_allclose(statistics["expand.norm.mean"], middle.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(statistics["expand.norm.var"], middle.var((0, 1, 2)), rtol=1e-4)
    assert _run_block(block, X)[1] is None


def test_devices_share_their_statistics():
    """Outputs, statistics and gradients of four devices, one image each, are those of one device with all four."""
    norm = BatchNorm(8, train_affine=True)
    weight = np.random.default_rng(1).normal(size=X.shape).astype(np.float32)
    graph, state = nnx.split(norm)

    def run(state, x, weight, axes=()):
        norm = nnx.merge(graph, state, copy=True)
        use_batch_statistics(norm, axes)
        return jnp.sum((norm(x) ** 2 * weight), axis=(1, 2, 3)), running_statistics(norm)

    mesh = make_mesh(1, 4, 1, devices=jax.devices()[:4])
    specs = dict(in_specs=(P(), BATCH_SPEC, BATCH_SPEC), out_specs=(BATCH_SPEC, P()))
    split = jax.shard_map(partial(run, axes=BATCH_AXES), mesh=mesh, **specs, check_vma=False)

    def loss_of(function):
        def loss(x):
            values, statistics = function(state, x, weight)
            return jnp.sum(values), statistics

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    ours, expected = loss_of(split)(X), loss_of(run)(X)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), ours, expected)


class Toy(nnx.Module):
    def __init__(self, rngs):
        self.norm = BatchNorm(8, train_affine=True)
        self.head = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(x))


class ToyTask:
    whole_batch = True

    def inputs(self, batch):
        return batch

    def normalizers(self, batch):
        return jnp.float32(len(batch["x"]))

    def loss(self, model, batch, keys, normalizers):
        use_batch_statistics(model)
        loss = jnp.sum((model(batch["x"]) - 1) ** 2) / normalizers
        return loss, {"loss_toy": loss, STATISTICS: running_statistics(model)}


@pytest.mark.parametrize("parts", [1, 2])
def test_the_step_keeps_running_averages(parts):
    step = TrainStep(
        ModelDef(lambda: Toy(nnx.Rngs(0))),
        ToyTask(),
        optim=OptimConfig(learning_rate=1e-2, clip_norm=1.0, schedule="constant"),
        total_steps=5,
        mesh=make_mesh(1, 1, 1, devices=jax.devices()[:1]),
        config=StepConfig(accumulate=parts),
    )
    x = X[:, 0, 0]
    state, metrics = step(step.init(), {"x": x})
    assert set(metrics) == {"loss_toy", "loss", "grad_norm", "learning_rate", "bad_steps"}
    groups = [x[part::parts] for part in range(parts)]
    np.testing.assert_allclose(state.constants["norm.mean"], 0.1 * x.mean(0), rtol=1e-4)
    variance = np.mean([group.var(0) for group in groups], axis=0)
    np.testing.assert_allclose(state.constants["norm.var"], 0.9 + 0.1 * variance, rtol=1e-4)
    kept = np.asarray(state.constants["norm.mean"])
    state, metrics = step(state, {"x": np.full_like(x, np.nan)})
    assert metrics["bad_steps"] == 1
    np.testing.assert_array_equal(state.constants["norm.mean"], kept)
