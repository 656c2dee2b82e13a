"""The convolution's own gradient against XLA's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esg_jax.ops.conv import _kernel_gradient, conv3x3


@pytest.mark.parametrize("shape", [(2, 5, 7, 3), (1, 1, 1, 4), (2, 8, 2, 3)])
def test_value_and_gradients_equal_xla(shape):
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=shape), jnp.float32)
    kernel = jnp.asarray(random.normal(size=(3, 3, shape[-1], 5)), jnp.float32)
    weight = jnp.asarray(random.normal(size=(*shape[:3], 5)), jnp.float32)

    def reference(x, kernel):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims)

    np.testing.assert_allclose(conv3x3(x, kernel), reference(x, kernel), atol=1e-5)
    ours, expected = (
        jax.jit(jax.grad(lambda x, k, f=f: jnp.sum(f(x, k) * weight), (0, 1)))(x, kernel) for f in (conv3x3, reference)
    )
    for actual, desired in zip(ours, expected, strict=True):
        np.testing.assert_allclose(actual, desired, atol=1e-4)
    np.testing.assert_allclose(_kernel_gradient(x, kernel, weight), expected[1], atol=1e-4)
