"""Random numbers of many keys: uniform, independent between keys and parts."""

import jax
import jax.numpy as jnp
import numpy as np

from esg_jax.ops.random import uniform

COUNT = 1 << 18


def draw(seed, count=COUNT, part=0):
    return np.asarray(uniform(jax.random.key(seed), (count,), part))


def test_values_are_uniform():
    for seed in range(3):
        x = draw(seed)
        assert x.dtype == np.float32 and x.min() >= 0 and x.max() < 1
        counts = np.histogram(x, 256, (0, 1))[0]
        chi2 = np.sum((counts - COUNT / 256) ** 2) / (COUNT / 256)
        assert 150 < chi2 < 380  # 255 degrees of freedom, five standard deviations and more


def test_low_bits_are_uniform_too():
    low = (draw(7) * 2**23).astype(np.int64) % 64
    chi2 = np.sum((np.bincount(low, minlength=64) - COUNT / 64) ** 2) / (COUNT / 64)
    assert 20 < chi2 < 125


def test_neighbours_and_keys_are_independent():
    """Pairs fill the square evenly: points take neighbouring numbers as x and y."""
    x = draw(0)
    others = {"next": draw(0)[1:], "third": draw(0)[3:], "key 1": draw(1), "part 1": draw(0, part=1)}
    for name, y in others.items():
        size = len(y)
        counts = np.histogram2d(x[:size], y, 32, ((0, 1), (0, 1)))[0]
        chi2 = np.sum((counts - size / 1024) ** 2) / (size / 1024)
        assert 780 < chi2 < 1270, name


def test_a_key_and_a_part_decide_alone():
    keys = jax.random.split(jax.random.key(3), 4)
    together = uniform(keys, (10, 2), jnp.int32(6))
    for key, row in zip(keys, together, strict=True):
        np.testing.assert_array_equal(uniform(key, (10, 2), 6), row)
    assert len(np.unique(np.asarray(together))) > 70
