import numpy as np
import pytest
from pycocotools import mask as coco_mask

from esg_jax.masks import rle
from esg_jax.masks.layers import label_layers


def random_mask(rng, height, width, density):
    return rng.random((height, width)) < density


@pytest.mark.parametrize("height,width", [(1, 1), (7, 5), (40, 33), (300, 200)])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_counts_and_decode_equal_pycocotools(height, width, density):
    mask = random_mask(np.random.default_rng(height), height, width, density)
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    runs = rle.runs_of(rle.to_json(encoded), (height, width))
    np.testing.assert_array_equal(rle.decode(rle.from_runs(runs, mask.shape)), mask)
    np.testing.assert_array_equal(runs, rle.runs_of_mask(mask))
    assert rle.from_runs(runs, mask.shape) == encoded and runs[1::2].sum() == mask.sum()


def test_polygons_equal_pycocotools():
    polygons = [[1.5, 1.0, 20.0, 3.0, 12.0, 25.5], [30.0, 30.0, 38.0, 30.0, 38.0, 36.0, 30.0, 36.0], [1, 2, 3, 4]]
    expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons[:2], 40, 50)))
    np.testing.assert_array_equal(
        rle.decode(rle.from_runs(rle.runs_of(polygons, (40, 50)), (40, 50))), expected.astype(bool)
    )


def test_empty_polygon_list_is_an_empty_mask():
    assert rle.runs_of([], (4, 6)).tolist() == [24]


@pytest.mark.parametrize(
    "segmentation,message",
    [
        ({"size": [4, 6], "counts": [30]}, "runs fill 30 pixels"),
        ({"size": [6, 4], "counts": [24]}, r"size \[6, 4\]"),
        ({"counts": [24]}, "needs the keys"),
        ({"size": [4, 6], "counts": "\x7f"}, "alphabet"),
        ({"size": [4, 6], "counts": "P"}, "cut off"),
        ("abc", "expected an RLE or a list"),
    ],
)
def test_malformed_segmentations_are_refused(segmentation, message):
    with pytest.raises(ValueError, match=message):
        rle.runs_of(segmentation, (4, 6))


def test_label_map_round_trip():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, (31, 17))
    rles = rle.encode_labels(labels, 5)
    for k in range(5):
        np.testing.assert_array_equal(rle.decode(rles[k]), labels == k + 1)
        np.testing.assert_array_equal(coco_mask.decode(rles[k]), labels == k + 1)
    np.testing.assert_array_equal(rle.areas(rles), np.bincount(labels.ravel(), minlength=6)[1:])


def test_disjoint_entities_share_one_layer():
    labels = np.random.default_rng(1).integers(0, 300, (40, 30))
    rles = rle.encode_labels(labels, 299)
    layers = label_layers([rle.runs_of(code, (40, 30)) for code in rles], 40, 30)
    assert len(layers) == 1
    np.testing.assert_array_equal(layers[0], labels)


def test_overlapping_entities_keep_their_whole_masks():
    rng = np.random.default_rng(2)
    masks = [random_mask(rng, 20, 25, density) for density in (0.3, 0.01, 0.9, 0.0, 0.02, 1.0)]
    counts = [rle.runs_of(coco_mask.encode(np.asfortranarray(m.astype(np.uint8))), (20, 25)) for m in masks]
    layers = label_layers(counts, 20, 25)
    assert 2 <= len(layers) <= 5
    for k, mask in enumerate(masks):
        holding = [layer for layer in layers if (layer == k + 1).any()]
        assert len(holding) == (1 if mask.any() else 0)
        if holding:
            np.testing.assert_array_equal(holding[0] == k + 1, mask)
