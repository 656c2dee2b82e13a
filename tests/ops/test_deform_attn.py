"""Deformable attention against a float64 loop."""

import jax
import numpy as np
from jax import numpy as jnp

from esg_jax.ops.deform_attn import deform_attn


def reference(values, shapes, locations, weights):
    """Textbook loop in float64: bilinear, zero padding, pixel = location * size - 0.5."""
    values, weights = np.float64(values), np.float64(weights)
    batch, queries, heads = locations.shape[:3]
    out = np.zeros((batch, queries, heads, values.shape[-1]))
    for index in np.ndindex(weights.shape):
        b, q, h, level, _ = index
        height, width = shapes[level]
        start = sum(i * j for i, j in shapes[:level])
        x, y = np.float64(locations[index]) * (width, height) - 0.5
        for yi in (int(np.floor(y)), int(np.floor(y)) + 1):
            for xi in (int(np.floor(x)), int(np.floor(x)) + 1):
                if 0 <= yi < height and 0 <= xi < width:
                    coefficient = (1 - abs(x - xi)) * (1 - abs(y - yi)) * weights[index]
                    out[b, q, h] += coefficient * values[b, start + yi * width + xi, h]
    return out.reshape(batch, queries, -1)


def example(shapes, batch=2, queries=7, heads=2, channels=4, points=3, seed=0, spread=0.7):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((batch, sum(h * w for h, w in shapes), heads, channels), np.float32)
    locations = np.float32(0.5 + rng.uniform(-spread, spread, (batch, queries, heads, len(shapes), points, 2)))
    weights = rng.random((batch, queries, heads, len(shapes), points), np.float32)
    return values, locations, weights


def test_forward():
    shapes = ((3, 5), (1, 1), (6, 4))
    values, locations, weights = example(shapes)
    out = jax.jit(deform_attn, static_argnums=1)(values, shapes, locations, weights)
    np.testing.assert_allclose(out, reference(values, shapes, locations, weights), atol=1e-5)


def test_chunked_equals_whole(monkeypatch):
    shapes = ((3, 5), (6, 4))
    args = example(shapes, queries=37)

    def loss(values, locations, weights):
        return jnp.sin(deform_attn(values, shapes, locations, weights)).sum()

    whole = jax.value_and_grad(loss, (0, 1, 2))(*args)
    monkeypatch.setattr("esg_jax.ops.deform_attn.xla._CHUNK_BYTES", 3_000)
    monkeypatch.setattr("esg_jax.ops.deform_attn.xla._BLOCK_ROWS", 2_000)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), jax.value_and_grad(loss, (0, 1, 2))(*args), whole
    )
