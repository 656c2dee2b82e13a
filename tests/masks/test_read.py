import json
import re

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from esg_jax.masks import MaskSet
from esg_jax.masks.read import read_masks
from esg_jax.masks.rle import to_json
from esg_jax.masks.write import write_arrays

SIZE = (6, 8)


def rle(mask):
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return to_json(encoded)


@pytest.fixture
def masks():
    """Two disjoint masks and one that overlaps both."""
    out = np.zeros((3, *SIZE), bool)
    out[0, :3], out[1, 3:, 2:], out[2, 2:4, 1:5] = True, True, True
    return out


def decoded(found):
    return np.stack([sum(layer == k + 1 for layer in found.layers) > 0 for k in range(len(found))])


def test_arrays(masks, tmp_path):
    for array in (masks, masks.astype(np.uint8), masks.astype(np.float32) * 0.9):
        np.testing.assert_array_equal(decoded(read_masks(array, SIZE)), masks)
    assert read_masks(masks.astype(np.float32), SIZE).probabilities.shape == masks.shape
    label_map = np.where(masks[0], 7, np.where(masks[1], 3, 0))
    found = read_masks(label_map, SIZE)
    assert found.ids == (3, 7)
    np.testing.assert_array_equal(decoded(found), masks[[1, 0]])
    np.savez(tmp_path / "m.npz", masks=masks, scores=np.array([0.5, 0.25, 1]))
    np.testing.assert_array_equal(read_masks(tmp_path / "m.npz", SIZE).scores, [0.5, 0.25, 1])
    np.save(tmp_path / "m.npy", masks)
    np.testing.assert_array_equal(decoded(read_masks(tmp_path / "m.npy", SIZE)), masks)
    assert len(read_masks(np.zeros((0, *SIZE), bool), SIZE)) == 0


def test_arrays_of_esg_predict(masks, tmp_path):
    """Rows without a pixel keep their number; files of earlier versions had -1 where there is nothing."""
    label_map, scores = (masks[0] + 3 * masks[1]).astype(np.int16), np.array([0.9, 0.8, 0.7], np.float32)
    found = MaskSet([label_map], (1, 2, 3), scores)
    write_arrays(tmp_path / "new.npz", found)
    np.savez(tmp_path / "old.npz", label_map=label_map - 1, scores=scores)
    for name in ("new.npz", "old.npz"):
        read = read_masks(tmp_path / name, SIZE)
        assert read.ids == (1, 3) and read.scores.tolist() == pytest.approx([0.9, 0.7])
        np.testing.assert_array_equal(decoded(read), masks[:2])


def test_png_label_maps(masks, tmp_path):
    labels = (np.where(masks[0], 7, 0) + np.where(masks[1], 300, 0)).astype(np.uint16)
    Image.fromarray(labels).save(tmp_path / "gray.png")
    rgb = np.stack([labels % 256, labels // 256, 0 * labels], -1).astype(np.uint8)
    Image.fromarray(rgb).save(tmp_path / "panoptic.png")
    for name in ("gray.png", "panoptic.png"):
        found = read_masks(tmp_path / name, SIZE)
        assert found.ids == (7, 300)
        np.testing.assert_array_equal(decoded(found), masks[:2])


def test_json_forms(masks, tmp_path):
    rles = [rle(mask) for mask in masks]
    records = [{"id": 5 + k, "image_id": 1, "segmentation": r, "score": 0.5} for k, r in enumerate(rles)]
    coco = {"images": [{"id": 1, "file_name": "a/x.jpg"}, {"id": 2, "file_name": "y.jpg"}], "annotations": records}
    for content, ids, scores in (
        (rles, (1, 2, 3), None),
        (records, (5, 6, 7), [0.5] * 3),
        (coco, (5, 6, 7), [0.5] * 3),
    ):
        (tmp_path / "m.json").write_text(json.dumps(content))
        found = read_masks(tmp_path / "m.json", SIZE, "x.jpg")
        assert found.ids == ids
        assert (None if found.scores is None else found.scores.tolist()) == scores
        np.testing.assert_array_equal(decoded(found), masks)
    assert len(read_masks(tmp_path / "m.json", SIZE, "y.jpg")) == 0


def test_folder_of_binary_pngs(masks, tmp_path):
    for k, mask in enumerate(masks):
        Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / f"{k}.png")
    found = read_masks(tmp_path, SIZE)
    assert found.ids == ("0", "1", "2")
    np.testing.assert_array_equal(decoded(found), masks)


def _write(path, content):
    path.write_text(content)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: np.zeros((5, 8), int), "the array of masks is 5x8 pixels, its image is 6x8"),
        (lambda p: np.zeros((1, 5, 8), bool), "the array of masks is 5x8 pixels"),
        (lambda p: np.full((1, *SIZE), 3.0), "values outside of 0..1"),
        (lambda p: np.full((1, *SIZE), 3), "values other than 0 and 1"),
        (lambda p: np.full(SIZE, -1), "the value -1"),
        (lambda p: np.zeros(SIZE), "label map of float64"),
        (lambda p: np.zeros(8, int), "has shape (8,)"),
        (lambda p: _write(p / "m.json", "{"), "is not valid JSON"),
        (lambda p: _write(p / "m.json", "{}"), "without 'images' and 'annotations'"),
        (lambda p: _write(p / "m.json", "[3]"), "mask 0 is a int"),
        (lambda p: _write(p / "m.json", '[{"size": [5, 8], "counts": "0"}]'), "mask 0: RLE size [5, 8] differs"),
        (lambda p: _write(p / "m.json", '{"images": [], "annotations": []}'), "lists 0 images named 'x.jpg'"),
        (lambda p: _write(p / "m.png", "no picture"), "cannot read masks"),
        (lambda p: _write(p / "m.npy", "no array"), "cannot read masks"),
    ],
)
def test_bad_masks(make, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_masks(make(tmp_path), SIZE, "x.jpg")


def test_missing_masks(tmp_path):
    with pytest.raises(FileNotFoundError, match="masks not found"):
        read_masks(tmp_path / "none.png", SIZE)
    with pytest.raises(FileNotFoundError, match="no PNG in folder of masks"):
        read_masks(tmp_path, SIZE)
