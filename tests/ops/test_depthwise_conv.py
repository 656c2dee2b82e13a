"""The CPU form of the depthwise convolution equals the native one, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esg_jax.ops import depthwise_conv


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(6, 8), (5, 7), (2, 1)])
@pytest.mark.parametrize("padding", [((1, 1), (1, 1)), ((0, 1), (2, 0))])
def test_shifted_form_equals_native(stride, size, padding):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, *size, 5)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 1, 5)), jnp.float32)
    actual, vjp = jax.vjp(lambda x, kernel: depthwise_conv.depthwise_conv3x3(x, kernel, stride, padding), x, kernel)
    expected, native_vjp = jax.vjp(
        lambda x, kernel: depthwise_conv._native(x, kernel, stride=stride, padding=padding), x, kernel
    )
    np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=1e-5)
    cotangent = jnp.asarray(rng.normal(size=expected.shape), jnp.float32)
    for ours, theirs in zip(vjp(cotangent), native_vjp(cotangent), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


def test_the_form_is_chosen_by_platform():
    """CPU gets no grouped convolution; a TPU lowering of the same function gets nothing else."""
    args = (jnp.zeros((1, 8, 8, 4)), jnp.zeros((3, 3, 1, 4)))
    traced = jax.jit(jax.grad(lambda x, k: depthwise_conv.depthwise_conv3x3(x, k, 1).sum(), (0, 1))).trace(*args)
    assert "convolution" not in traced.lower(lowering_platforms=("cpu",)).as_text()
    tpu = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "convolution" in tpu and "while" not in tpu


def test_bfloat16_stays_bfloat16():
    x = jnp.ones((1, 4, 4, 3), jnp.bfloat16)
    kernel = jnp.ones((3, 3, 1, 3), jnp.bfloat16)
    out, vjp = jax.vjp(lambda x, k: depthwise_conv.depthwise_conv3x3(x, k, 2), x, kernel)
    assert out.dtype == jnp.bfloat16
    assert [grad.dtype for grad in vjp(out)] == [jnp.bfloat16, jnp.bfloat16]
