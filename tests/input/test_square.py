"""GELLA's squares: picture and label map lie alike, whatever side is padded."""

import jax.numpy as jnp
import numpy as np
import pytest

from esg_jax.input.grounding import GroundingDataConfig
from esg_jax.input.pipeline import DataConfig
from esg_jax.input.records import Entities
from esg_jax.input.square import content_slices, entity_map, square_image, square_labels
from esg_jax.masks import MaskSet
from esg_jax.ops.padding import PAD_POSITIONS, content_mask, content_start


@pytest.mark.parametrize("shape", [(30, 64), (64, 30), (64, 64), (64, 1)])
@pytest.mark.parametrize("pad_position", PAD_POSITIONS)
def test_content_and_padding(shape, pad_position):
    image = np.full((*shape, 3), 200, np.uint8)
    pixels, size = square_image(image, 64, pad_position)
    labels, map_size = square_labels(np.ones(shape, np.int16), 32, pad_position)
    assert tuple(size) == shape and pixels.shape == (64, 64, 3)
    for square, sizes in ((pixels[..., 0], size), (labels, map_size)):
        side = len(square)
        rows, columns = content_slices(tuple(int(x) for x in sizes), side, pad_position)
        inside = np.zeros((side, side), bool)
        inside[rows, columns] = True
        np.testing.assert_array_equal(square > 0, inside)
        for module in (np, jnp):  # the same on the host and on the device
            np.testing.assert_array_equal(
                content_mask(side, side, module.asarray(sizes)[None], pad_position)[0], inside
            )


def test_the_odd_row_is_behind_the_content():
    assert [content_start(size, 8, "center") for size in (8, 7, 5, 2)] == [0, 0, 1, 3]
    assert content_start(5, 8, "bottom_right") == 0


def test_centred_entities_are_the_same_entities():
    layer = np.zeros((20, 40), np.int32)
    layer[2:10, 4:20], layer[12:20, 30:40] = 1, 2
    entities = Entities.unlabelled(MaskSet([layer], (1, 2)))
    plain, size, slots = entity_map(entities, 32, 5)
    centred, centred_size, centred_slots = entity_map(entities, 32, 5, "center")
    assert size.tolist() == centred_size.tolist() == [16, 32] and slots.tolist() == centred_slots.tolist()
    np.testing.assert_array_equal(np.roll(plain, 8, axis=0), centred)


@pytest.mark.parametrize("config", [DataConfig, GroundingDataConfig])
def test_unknown_position_is_refused(config):
    with pytest.raises(ValueError, match="data.pad_position is 'top'; choose one of bottom_right, center"):
        config(pad_position="top")
