"""Colours of entities: distinct, repeatable, and packed masks that equal numpy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esg_jax.models.gella.colormap import ColormapConfig, colorize, location_colors, pack_labels, random_colors


def label_map(rng, entities=6, size=64):
    labels = np.zeros((size, size), np.int16)
    for entity in range(1, entities + 1):
        y, x = rng.integers(0, size - 12, 2)
        labels[y : y + 12, x : x + 12] = entity
    return labels


@pytest.mark.parametrize("count", [1, 100, 342, 400])
def test_random_colors_are_distinct_and_never_black(count):
    colors = np.asarray(random_colors(jax.random.key(3), count)).astype(int)
    assert colors.shape == (count + 1, 3)
    assert (colors[0] == 0).all()
    assert colors.min() >= 0 and colors.max() <= 255
    distance = np.abs(colors[:, None] - colors[None]).max(-1) + 1000 * np.eye(count + 1, dtype=int)
    assert distance.min() >= (18 if count <= 342 else 1)


@pytest.mark.parametrize("assignment", ["random", "location", "index"])
def test_a_colormap_has_one_colour_per_entity(assignment):
    labels = label_map(np.random.default_rng(0))
    maps = jnp.asarray(np.stack([labels, labels.T]))
    keys = jax.random.split(jax.random.key(1), 2)
    colors = np.asarray(colorize(maps, keys, 10, ColormapConfig(size=64, assignment=assignment)))
    for image, ids in zip(colors, np.asarray(maps), strict=True):
        pairs = {
            (int(label), *map(float, color)) for label, color in zip(ids.ravel(), image.reshape(-1, 3), strict=True)
        }
        assert len(pairs) == len(np.unique(ids)) == len({pair[1:] for pair in pairs})
        assert (image[ids == 0] == 0).all()
    again = colorize(maps, keys, 10, ColormapConfig(size=64, assignment=assignment))
    np.testing.assert_array_equal(colors, again)


def test_random_colours_differ_between_draws():
    labels = jnp.asarray(label_map(np.random.default_rng(0)))[None]
    first, second = (colorize(labels, jax.random.split(jax.random.key(k), 1), 8, ColormapConfig(64)) for k in (0, 1))
    assert not np.array_equal(first, second)


def test_location_colours_follow_the_mass_centre_and_collisions_move_the_smaller():
    labels = np.zeros((160, 200), np.int16)
    labels[0:8, 0:8] = 2  # both in cell (0, 0); the larger entity keeps it
    labels[8:10, 0:2] = 1
    labels[150:160, 190:200] = 3
    alone = np.asarray(location_colors(jnp.asarray(np.where(labels == 1, 1, 0)), 3))
    colors = np.asarray(location_colors(jnp.asarray(labels), 3))
    assert (colors[2] == alone[1]).all()
    assert len({tuple(color) for color in colors}) == 4


def test_packed_masks_equal_packbits():
    labels = np.stack([label_map(np.random.default_rng(seed)) for seed in range(2)])
    packed, present = pack_labels(jnp.asarray(labels), 9)
    masks = labels[:, None] == np.arange(1, 10)[:, None, None]
    np.testing.assert_array_equal(packed, np.packbits(masks, axis=-1))
    np.testing.assert_array_equal(present, masks.any((2, 3)))


@pytest.mark.parametrize("bad", [{"size": 100}, {"assignment": "painter"}, {"jitter": 20}])
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match=f"colormap.{next(iter(bad))}"):
        ColormapConfig(**bad)
