import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esg_jax.ops.resize import bilinear_matrix, resize_bilinear

SIZES = [((7, 9), (14, 18)), ((20, 31), (5, 8)), ((16, 24), (90, 131)), ((13, 1), (13, 4)), ((5, 6), (5, 6))]


@pytest.mark.torch
@pytest.mark.parametrize(("source", "target"), SIZES)
@pytest.mark.parametrize("channels_last", [True, False])
def test_equals_torch(source, target, channels_last):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x_nchw = rng.standard_normal((2, 3, *source)).astype(np.float32)
    cotangent = rng.standard_normal((2, 3, *target)).astype(np.float32)
    expected_in = torch.tensor(x_nchw, requires_grad=True)
    expected = torch.nn.functional.interpolate(expected_in, target, mode="bilinear", align_corners=False)
    expected.backward(torch.tensor(cotangent))

    def layout(a):
        return a.transpose(0, 2, 3, 1) if channels_last else a

    axes = (-3, -2) if channels_last else (-2, -1)
    actual, pullback = jax.vjp(lambda x: resize_bilinear(x, target, axes=axes), jnp.asarray(layout(x_nchw)))
    np.testing.assert_allclose(actual, layout(expected.detach().numpy()), atol=2e-6)
    np.testing.assert_allclose(pullback(jnp.asarray(layout(cotangent)))[0], layout(expected_in.grad.numpy()), atol=1e-5)


def test_gathers_equal_the_matrix():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((11, 17, 2)), jnp.float32)
    expected = jnp.einsum("Hh,Ww,hwc->HWc", bilinear_matrix(11, 30), bilinear_matrix(17, 6), x)
    np.testing.assert_allclose(jax.jit(resize_bilinear, static_argnums=1)(x, (30, 6)), expected, atol=1e-6)


def test_keeps_bfloat16_but_interpolates_in_float32():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 8, 1)), jnp.bfloat16)
    out = resize_bilinear(x, (24, 24))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, resize_bilinear(x.astype(jnp.float32), (24, 24)).astype(jnp.bfloat16))


def test_refuses_an_empty_side():
    with pytest.raises(ValueError, match="positive"):
        resize_bilinear(jnp.zeros((4, 4, 1)), (0, 3))
