"""Normalisation against Flax's modules, which automatic differentiation differentiates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esg_jax.ops.normalization import group_norm, layer_norm

EPSILON = 1e-5


def values_and_gradients(function, *args):
    weights = jnp.asarray(np.random.default_rng(1).normal(size=args[0].shape), jnp.float32)
    out = function(*args)
    return out, jax.grad(lambda *args: jnp.sum(function(*args).astype(jnp.float32) * weights), argnums=(0, 1, 2))(*args)


def arguments(shape, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x = jnp.asarray(3 * rng.normal(size=shape) + 5, dtype)
    return x, *(jnp.asarray(rng.normal(size=shape[-1:]), jnp.float32) for _ in range(2))


def flax_norm(module):
    def run(x, scale, bias):
        graph, state = nnx.split(module)
        state["scale"], state["bias"] = nnx.Param(scale), nnx.Param(bias)
        return nnx.merge(graph, state)(x)

    return run


@pytest.mark.parametrize("shape", [(6, 24), (2, 3, 5, 24)])
def test_layer_norm_equals_flax(shape):
    module = nnx.LayerNorm(shape[-1], epsilon=EPSILON, use_fast_variance=False, rngs=nnx.Rngs(0))
    args = arguments(shape)
    ours = values_and_gradients(lambda *args: layer_norm(*args, EPSILON), *args)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), ours, values_and_gradients(flax_norm(module), *args)
    )


def test_group_norm_equals_flax():
    args = arguments((2, 4, 6, 24))
    module = nnx.GroupNorm(24, num_groups=8, epsilon=EPSILON, use_fast_variance=False, rngs=nnx.Rngs(0))
    ours = values_and_gradients(lambda *args: group_norm(*args, 8, EPSILON), *args)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), ours, values_and_gradients(flax_norm(module), *args)
    )


def test_bfloat16_keeps_its_type_and_float32_statistics():
    x, scale, bias = arguments((4, 512), jnp.bfloat16)
    out, (slope, *_) = values_and_gradients(lambda *args: layer_norm(*args, EPSILON), x, scale, bias)
    assert out.dtype == slope.dtype == jnp.bfloat16
    exact = layer_norm(x.astype(jnp.float32), scale, bias, EPSILON)
    np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))


def test_channels_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="24 channels do not divide into 7 groups"):
        group_norm(*arguments((1, 2, 2, 24)), 7, EPSILON)
