"""Sampling at points against a plain loop and against PyTorch's grid_sample."""

import jax
import numpy as np
import pytest

from esg_jax.ops.point_sample import point_sample, point_sample_features, point_sample_packed

HEIGHT, WIDTH = 5, 16


@pytest.fixture(scope="module")
def points():
    """Inside, on the borders, in the outer half cell, and outside."""
    rng = np.random.default_rng(0)
    inside = rng.uniform(size=(2, 3, 30, 2))
    special = [(0, 0), (1, 1), (0.5 / WIDTH, 0.5 / HEIGHT), (0.01, 0.99), (-0.01, 0.5), (0.5, 1.2), (3, -2)]
    special = np.broadcast_to(np.array(special), (2, 3, len(special), 2))
    return np.concatenate([inside, special], axis=2).astype(np.float32)


def bilinear(image, point):
    """Value of one map at (x, y) in [0, 1], zero outside: the definition in a loop."""
    height, width = image.shape
    x, y = np.float64(point[0]) * width - 0.5, np.float64(point[1]) * height - 0.5
    total = 0.0
    for row in range(height):
        for column in range(width):
            total += image[row, column] * max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row))
    return total


def expected(maps, points):
    out = np.zeros(points.shape[:-1])
    for index in np.ndindex(*points.shape[:-1]):
        out[index] = bilinear(maps[index[:-1]], points[index])
    return out


def test_scalar_maps(points):
    maps = np.random.default_rng(1).normal(size=(2, 3, HEIGHT, WIDTH)).astype(np.float32)
    np.testing.assert_allclose(point_sample(maps, points), expected(maps, points), atol=1e-5)


def test_feature_maps(points):
    maps = np.random.default_rng(1).normal(size=(2, HEIGHT, WIDTH, 4)).astype(np.float32)
    actual = point_sample_features(maps, points[:, 0])
    for channel in range(4):
        np.testing.assert_allclose(actual[..., channel], expected(maps[..., channel], points[:, 0]), atol=1e-5)


def test_packed_masks_equal_unpacked_ones(points):
    masks = np.random.default_rng(1).uniform(size=(2, 3, HEIGHT, WIDTH)) < 0.5
    actual = point_sample_packed(np.packbits(masks, axis=-1), points)
    np.testing.assert_allclose(actual, expected(masks, points), atol=1e-5)


def test_packed_masks_are_never_unpacked(points):
    """Whatever the compiler needs beside its arguments is smaller than the unpacked masks."""
    masks = jax.ShapeDtypeStruct((2, 3, 2048, 256), np.uint8)
    compiled = jax.jit(point_sample_packed).lower(masks, jax.ShapeDtypeStruct(points.shape, np.float32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 3 * 2048 * 256


@pytest.mark.torch
def test_equals_grid_sample_with_gradients(points):
    torch = pytest.importorskip("torch")
    maps = np.random.default_rng(1).normal(size=(6, 1, HEIGHT, WIDTH)).astype(np.float32)
    flat = points.reshape(6, -1, 2)
    theirs = torch.from_numpy(maps).requires_grad_()
    sampled = torch.nn.functional.grid_sample(
        theirs, torch.from_numpy(2 * flat - 1)[:, None], padding_mode="zeros", align_corners=False
    )
    sampled.square().sum().backward()
    ours, gradient = jax.value_and_grad(lambda m: (point_sample(m, flat) ** 2).sum())(maps[:, 0])
    np.testing.assert_allclose(ours, sampled.square().sum().item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, theirs.grad[:, 0].numpy(), atol=1e-5)
