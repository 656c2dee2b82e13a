import numpy as np
import pytest

from esg_jax.inference.entities.predictions import EntityPrediction
from esg_jax.masks import disjoint_masks, rle
from esg_jax.masks.read import read_masks

SIZE = (4, 6)


@pytest.fixture
def overlapping():
    """Three probabilities maps: the left 4 columns, the right 4 columns, and a small one inside of both."""
    out = np.zeros((3, *SIZE), np.float32)
    out[0, :, :4], out[1, :, 2:], out[2, 1:3, 2:4] = 0.9, 0.6, 0.7
    return out


def owners(masks, **options):
    return disjoint_masks(masks, **options).label_map[1].tolist()


def test_who_owns_contested_pixels(overlapping):
    plain = read_masks(overlapping > 0.5, SIZE)
    assert owners(plain, overlap="area") == [1, 1, 3, 3, 2, 2]
    assert owners(plain, overlap="score") == [1, 1, 3, 3, 2, 2]  # no scores: as "area"
    scored = read_masks([{**rle, "score": s} for rle, s in zip(plain.rles(), (0.5, 0.9, 0.1), strict=True)], SIZE)
    found = disjoint_masks(scored, overlap="score")
    assert found.label_map[1].tolist() == [1, 1, 2, 2, 2, 2]
    assert found.dropped == (3,) and found.ids == (1, 2) and found.scores.tolist() == pytest.approx([0.5, 0.9])
    assert owners(read_masks(overlapping, SIZE), overlap="logit") == [1, 1, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="overlap 'logit' needs probabilities"):
        disjoint_masks(plain, overlap="logit")
    with pytest.raises(ValueError, match="overlap is 'best'"):
        disjoint_masks(plain, overlap="best")


def test_small_and_surplus_masks_are_dropped_and_named(overlapping):
    plain = read_masks(overlapping > 0.5, SIZE)
    found = disjoint_masks(plain, overlap="area", min_area=5)
    assert found.ids == (1, 2) and found.dropped == (3,)
    assert (found.label_map == 0).sum() == 4  # its pixels belong to nobody
    assert found.areas.tolist() == [12, 8]
    found = disjoint_masks(plain, overlap="area", max_entities=1)
    assert len(found) == 1 and found.dropped == (2, 3)
    with pytest.raises(ValueError, match="there are no masks"):
        disjoint_masks(read_masks(np.zeros((0, *SIZE), bool), SIZE))
    with pytest.raises(ValueError, match="all 3 masks are empty or smaller than min_area 100"):
        disjoint_masks(plain, min_area=100)


def test_masks_of_entities(overlapping):
    found = disjoint_masks(read_masks(overlapping > 0.5, SIZE), overlap="area")
    np.testing.assert_array_equal(found.union([0, 2]), (found.label_map == 1) | (found.label_map == 3))
    assert not found.union([]).any()
    assert [int(rle["size"][1]) for rle in found.rles()] == [6] * 3


def test_overlapping_masks(overlapping):
    """Selecting, joining and encoding do not depend on which layer a mask lies in."""
    inside = overlapping > 0.5
    found = read_masks(overlapping, SIZE)
    assert len(found.layers) > 1 and found.areas.tolist() == inside.sum((1, 2)).tolist()
    np.testing.assert_array_equal(found.masks, inside)
    np.testing.assert_array_equal(found.union([1, 2]), inside[1] | inside[2])
    np.testing.assert_array_equal([rle.decode(code) for code in found.rles()], inside)
    chosen = found.select(np.array([False, True, True]))
    assert chosen.ids == (2, 3) and chosen.probabilities.shape == (2, *SIZE)
    np.testing.assert_array_equal(chosen.masks, inside[1:])
    with pytest.raises(ValueError, match="3 masks in 3 layers are no single label map"):
        found.label_map  # noqa: B018


def test_a_segmenters_prediction():
    label_map = np.array([[1, 1, 3, 3], [1, 1, 0, 3]], np.int16)
    zeros = np.zeros(3, np.int32)
    scores = np.array([0.9, 0.8, 0.7], np.float32)
    found = EntityPrediction.of(label_map, scores, labels=zeros, queries=zeros, class_scores=scores)
    masks = disjoint_masks(found.select(found.areas > 0))
    assert masks.ids == (1, 3) and masks.dropped == () and masks.scores.tolist() == pytest.approx([0.9, 0.7])
    np.testing.assert_array_equal(masks.label_map, [[1, 1, 2, 2], [1, 1, 0, 2]])
