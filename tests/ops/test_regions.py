"""Regions of label maps against plain loops."""

import numpy as np
import pytest

from esg_jax.ops.regions import bounding_boxes, mask_weights, nearest_labels, roi_align


@pytest.fixture(scope="module")
def labels():
    out = np.zeros((2, 12, 12), np.int32)
    out[0, 1:5, 2:11], out[0, 3:9, 0:3], out[1, 11, 11] = 1, 3, 2
    return out


def test_weights_are_shares_of_cells(labels):
    share, area = mask_weights(labels, 4, (3, 3))
    for image, entity in np.ndindex(2, 4):
        mask = labels[image] == entity + 1
        wanted = mask.reshape(3, 4, 3, 4).mean((1, 3))
        np.testing.assert_allclose(share[image, entity], wanted.ravel(), atol=1e-6)
        assert area[image, entity] == mask.sum()
    # Cells that do not divide the map: every pixel belongs to one cell, a full one weighs 1.
    share, _ = mask_weights(np.ones((1, 12, 12), np.int32), 1, (5, 7))
    np.testing.assert_array_equal(share, np.ones((1, 1, 35)))


def test_boxes(labels):
    boxes = np.array(bounding_boxes(labels, 4)) * 12
    np.testing.assert_allclose(boxes[0], [[2, 1, 11, 5], [0] * 4, [0, 3, 3, 9], [0] * 4], atol=1e-5)
    np.testing.assert_allclose(boxes[1], [[0] * 4, [11, 11, 12, 12], [0] * 4, [0] * 4], atol=1e-5)


def test_roi_align_of_linear_maps(labels):
    """Bilinear samples of a linear map are exact inside, so that a bin's mean is the value at its centre."""
    y, x = np.mgrid[0:12, 0:12]
    maps = np.stack([x, y], -1)[None].astype(np.float32)
    box = np.array([3, 2, 9, 8], np.float32) / 12
    values = np.array(roi_align(maps, box[None, None], 3, 2))[0, 0]
    centres = np.array([1, 3, 5])
    np.testing.assert_allclose(values[..., 0], np.broadcast_to(3 + centres - 0.5, (3, 3)), atol=1e-4)
    np.testing.assert_allclose(values[..., 1], np.broadcast_to(2 + centres - 0.5, (3, 3)).T, atol=1e-4)
    edge = np.array(roi_align(np.ones_like(maps), np.array([[[0, 0, 1, 1]]], np.float32), 12, 1))
    np.testing.assert_allclose(edge, np.ones_like(edge), atol=1e-6)


@pytest.mark.parametrize("side", [5, 12, 32])
def test_labels_of_another_size(labels, side):
    rows = np.floor((np.arange(side) + 0.5) * 12 / side).astype(int)
    np.testing.assert_array_equal(nearest_labels(labels, side), labels[:, rows[:, None], rows])
