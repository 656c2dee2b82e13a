import numpy as np
import pytest
from pycocotools import mask as coco_mask

from esg_jax.inference.entities.predictions import EntityPrediction
from esg_jax.masks.rle import encode_labels


@pytest.fixture
def prediction():
    label_map = np.zeros((7, 9), np.int16)
    label_map[:3, :4] = 3
    label_map[3:, 2:5] = 1
    label_map[6, 8] = 3
    return EntityPrediction.of(
        label_map,
        scores=np.array([0.7, 0.6, 0.4], np.float32),
        labels=np.zeros(3, np.int32),
        queries=np.array([5, 1, 3]),
        class_scores=np.array([0.9, 0.8, 0.5], np.float32),
    )


def test_masks_and_areas(prediction):
    assert prediction.masks.shape == (3, 7, 9)
    np.testing.assert_array_equal(prediction.masks.sum((1, 2)), prediction.areas)
    assert prediction.areas.tolist() == [12, 0, 13]


@pytest.mark.parametrize("seed", range(3))
def test_rles_equal_pycocotools(seed):
    label_map = np.random.default_rng(seed).integers(-1, 5, (13, 8)).astype(np.int16)
    label_map[:5] = seed + 1
    for label, rle in enumerate(encode_labels(label_map, 6), start=1):
        assert rle == coco_mask.encode(np.asfortranarray(label_map == label).astype(np.uint8))


def test_select_renumbers(prediction):
    chosen = prediction.select(np.array([False, True, True]))
    assert chosen.queries.tolist() == [1, 3]
    np.testing.assert_array_equal(chosen.masks, prediction.masks[1:])


def test_above_drops_empty_and_low_scores(prediction):
    assert prediction.above(0.5).queries.tolist() == [5]
    assert prediction.above(0.0).queries.tolist() == [5, 3]
    nothing = prediction.above(0.99)
    assert len(nothing) == 0 and (nothing.label_map == 0).all() and nothing.rles() == []
