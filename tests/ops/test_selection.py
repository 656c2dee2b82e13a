"""kth_smallest against sorting."""

import numpy as np
import pytest

from esg_jax.ops.selection import kth_smallest


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
