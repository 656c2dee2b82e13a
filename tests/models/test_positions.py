"""Sine encodings against the reference's arrays."""

import numpy as np
import pytest

from esg_jax.models.positions import sine_position, view_sine_position


@pytest.fixture(scope="module")
def golden(shared):
    return np.load(shared("fixtures", "cropformer", "infer_dev.npz"))


@pytest.mark.parametrize("level", [0, 1, 2])
def test_image_level_equals_reference(golden, level):
    expected = golden[f"mid/pos/image_level{level}"][0].transpose(1, 2, 0)
    np.testing.assert_allclose(sine_position(*expected.shape), expected, atol=1e-5)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_batch_level_equals_reference(golden, level):
    expected = golden[f"mid/pos/batch_level{level}"][0].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(view_sine_position(*expected.shape), expected, atol=1e-5)


def test_view_term_depends_on_the_number_of_views():
    two, five = view_sine_position(2, 3, 4, 8), view_sine_position(5, 3, 4, 8)
    assert not np.allclose(two[0], five[0])
