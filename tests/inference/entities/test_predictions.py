import numpy as np
import pytest
from pycocotools import mask as coco_mask

from esg_jax.inference.entities.predictions import EntityPrediction, label_map_rles


@pytest.fixture
def prediction():
    label_map = np.full((7, 9), -1, np.int16)
    label_map[:3, :4] = 2
    label_map[3:, 2:5] = 0
    label_map[6, 8] = 2
    return EntityPrediction(
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
    label_map = np.random.default_rng(seed).integers(-1, 4, (13, 8)).astype(np.int16)
    label_map[:5] = seed
    for label, rle in enumerate(label_map_rles(label_map, 6)):
        assert rle == coco_mask.encode(np.asfortranarray(label_map == label).astype(np.uint8))


def test_select_renumbers(prediction):
    chosen = prediction.select(np.array([False, True, True]))
    assert chosen.queries.tolist() == [1, 3]
    np.testing.assert_array_equal(chosen.masks, prediction.masks[1:])


def test_above_drops_empty_and_low_scores(prediction):
    assert prediction.above(0.5).queries.tolist() == [5]
    assert prediction.above(0.0).queries.tolist() == [5, 3]
    nothing = prediction.above(0.99)
    assert len(nothing) == 0 and (nothing.label_map == -1).all() and nothing.rles() == []
