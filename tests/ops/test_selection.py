"""Order statistics against sorting."""

import numpy as np
import pytest

from esg_jax.ops.selection import kth_smallest, smallest


@pytest.mark.parametrize("k", [1, 5, 99, 100])
def test_equals_sorting(k):
    x = np.abs(np.random.default_rng(0).normal(size=(3, 2, 100))).astype(np.float32)
    x[0, 0, :50] = 0.0
    x[1, 1, 7:] = x[1, 1, 6]
    x[2, 0, 3] = np.inf
    x[2, 1] *= 1e-40  # subnormal
    np.testing.assert_array_equal(kth_smallest(x, k)[..., 0], np.sort(x, axis=-1)[..., k - 1])


def test_k_out_of_range():
    with pytest.raises(ValueError, match="between 1 and 4"):
        kth_smallest(np.ones((2, 4), np.float32), 5)


@pytest.mark.parametrize(("count", "k"), [(100, 1), (128, 40), (1000, 250), (1000, 1000)])
def test_smallest_are_those_of_sorting(count, k):
    x = np.abs(np.random.default_rng(0).normal(size=(3, 2, count))).astype(np.float32)
    expected = np.sort(np.argsort(x, axis=-1, kind="stable")[..., :k], axis=-1)
    np.testing.assert_array_equal(smallest(x, k), expected)


def test_equal_values_fill_up_in_order():
    x = np.array([[1.0, 0.5, 1.0, 1.0, 0.25]], np.float32)
    np.testing.assert_array_equal(smallest(np.ones((1, 5), np.float32), 3), [[0, 1, 2]])
    assert 1 in np.asarray(smallest(x, 4))
