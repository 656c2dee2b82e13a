"""One suite for every implementation of deformable attention, against a float64 loop. Pallas runs in interpret mode."""

import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import PartitionSpec
from jax.test_util import check_grads

from esg_jax.ops.deform_attn import cuda, deform_attn, pallas_gpu, xla

ON_GPU = jax.default_backend() == "gpu" and not cuda.missing()
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs a GPU and the built CUDA kernels")]
)
IMPLEMENTATIONS = ["xla", "pallas_tpu", CUDA]
SLOW_INTERPRETED = ["xla", pytest.param("pallas_tpu", marks=pytest.mark.slow), CUDA]
SHAPES = ((3, 5), (1, 1), (7, 4))
KINDS = ["random", "pixel centres", "pixel borders", "map borders", "outside", "huge"]


def reference(values, shapes, locations, weights, grad_out=None):
    """Textbook loop in float64: bilinear, zero padding, pixel = location * size - 0.5; with gradients if asked."""
    values, weights = np.float64(values), np.float64(weights)
    batch, queries, heads = locations.shape[:3]
    out = np.zeros((batch, queries, heads, values.shape[-1]))
    grad_values, grad_locations, grad_weights = (
        np.zeros(values.shape),
        np.zeros(locations.shape),
        np.zeros(weights.shape),
    )
    grad_out = np.zeros(out.shape) if grad_out is None else np.float64(grad_out).reshape(out.shape)
    for index in np.ndindex(weights.shape):
        b, q, h, level, _ = index
        height, width = shapes[level]
        start = sum(i * j for i, j in shapes[:level])
        # In float32 like the implementations: a rounded location may lie on the other side of a kink.
        x, y = np.float64(np.float32(locations[index] * np.float32((width, height)) - np.float32(0.5)))
        x_low, y_low = np.floor(x), np.floor(y)
        for y_corner, slope_y in ((y_low, -1), (y_low + 1, 1)):
            for x_corner, slope_x in ((x_low, -1), (x_low + 1, 1)):
                if not (0 <= y_corner < height and 0 <= x_corner < width):
                    continue
                row = b, start + int(y_corner) * width + int(x_corner), h
                tent_x, tent_y = 1 - abs(x - x_corner), 1 - abs(y - y_corner)
                out[b, q, h] += weights[index] * tent_x * tent_y * values[row]
                dot = values[row] @ grad_out[b, q, h]
                grad_values[row] += weights[index] * tent_x * tent_y * grad_out[b, q, h]
                grad_weights[index] += tent_x * tent_y * dot
                grad_locations[index] += (
                    weights[index] * dot * np.array([slope_x * tent_y * width, slope_y * tent_x * height])
                )
    return out.reshape(batch, queries, -1), (grad_values, grad_locations, grad_weights)


def example(shapes=SHAPES, batch=2, queries=7, heads=2, channels=8, points=3, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((batch, sum(h * w for h, w in shapes), heads, channels), np.float32).astype(dtype)
    locations = np.float32(rng.uniform(-0.2, 1.2, (batch, queries, heads, len(shapes), points, 2)))
    weights = rng.random((batch, queries, heads, len(shapes), points), np.float32)
    return values, locations, weights / weights.sum((-1, -2), keepdims=True)


def place(kind, locations, shapes):
    """Replaces random locations by adversarial ones."""
    rng = np.random.default_rng(1)
    sizes = np.float32([(w, h) for h, w in shapes])[:, None]
    if kind == "pixel centres":
        return np.float32((np.floor(locations * sizes) + 0.5) / sizes)
    if kind == "pixel borders":
        return np.float32(np.round(locations * sizes) / sizes)
    if kind == "map borders":
        # The kinks of zero padding: half a pixel outside, the outer edge, the outer pixel centres.
        edge = rng.choice(np.float32([-0.5, 0, 0.5]), locations.shape)
        return np.float32(np.where(rng.random(locations.shape) < 0.5, edge, sizes - edge) / sizes)
    if kind == "outside":
        return np.float32(np.where(locations < 0.5, locations - 2, locations + 2))
    if kind == "huge":
        return np.float32(np.sign(locations - 0.5) * rng.choice(np.float32([1e3, 1e9, 1e30]), locations.shape))
    return locations


def run(args, shapes, implementation, grad_out):
    def forward(values, locations, weights):
        return deform_attn(values, shapes, locations, weights, implementation=implementation)

    @jax.jit
    def forward_backward(*args):
        out, pull = jax.vjp(forward, *args)
        return out, pull(grad_out.astype(out.dtype))

    return forward_backward(*args)


def assert_close(actual, expected, tolerance):
    """Largest error relative to the largest expected value."""
    actual = np.float64(np.asarray(actual.astype(jnp.float32)))
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    assert np.abs(actual - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


def check_against_reference(args, shapes, implementation, tolerance=1e-5):
    grad_out = np.random.default_rng(2).standard_normal(
        (*args[1].shape[:2], args[0].shape[2] * args[0].shape[3]), np.float32
    )
    out, grads = run(args, shapes, implementation, jnp.asarray(grad_out))
    expected, expected_grads = reference(*(args[0], shapes, *args[1:]), grad_out)
    assert out.dtype == args[0].dtype
    assert_close(out, expected, tolerance)
    for actual, wanted in zip(grads, expected_grads, strict=True):
        assert_close(actual, wanted, tolerance)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_locations(implementation, kind):
    values, locations, weights = example()
    check_against_reference((values, place(kind, locations, SHAPES), weights), SHAPES, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        (((1, 1),), dict(queries=1, batch=1, heads=1, points=1)),
        (((2, 3), (1, 7), (5, 1), (4, 4)), dict(queries=1, points=2)),
        (((9, 11), (5, 6), (3, 3)), dict(queries=131, batch=1, points=4, channels=16)),
        (((13, 17),), dict(queries=30, batch=3, heads=3, points=1, channels=4)),
        (((6, 5), (3, 3), (2, 2), (1, 1), (4, 9)), dict(queries=5, points=1)),
    ],
)
def test_shapes(implementation, shapes, options):
    check_against_reference(example(shapes, **options), shapes, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 1.5e-2), (jnp.float16, 2e-3)])
def test_half_precision_values(implementation, dtype, tolerance):
    # Only values, output and their gradients are rounded: tolerances are two units in the last place.
    args = example(dtype=dtype)
    if implementation == "pallas_tpu" and dtype == jnp.float16:
        with pytest.raises(ValueError, match="float16"):
            run(args, SHAPES, implementation, jnp.zeros((2, 7, 16)))
        return
    check_against_reference(args, SHAPES, implementation, tolerance)


@pytest.mark.parametrize("implementation", SLOW_INTERPRETED)
def test_numerical_gradients(implementation):
    # Away from pixel centres, where the function has kinks.
    shapes = ((4, 5), (2, 3))
    values, locations, weights = example(shapes, batch=1, queries=2, heads=1, channels=4, points=2)
    sizes = np.float32([(w, h) for h, w in shapes])[:, None]
    pixels = np.floor(locations * sizes - 0.5) + np.float32(0.3) + 0.4 * (locations % 1)
    locations = np.float32((pixels + 0.5) / sizes)

    def function(*args):
        return deform_attn(args[0], shapes, *args[1:], implementation=implementation)

    check_grads(function, (values, locations, weights), order=1, modes=["rev"], atol=2e-2, rtol=2e-2, eps=1e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("empty", [dict(batch=0), dict(queries=0)])
def test_empty(implementation, empty):
    args = example(**empty)
    batch, queries = args[1].shape[:2]
    out, grads = run(args, SHAPES, implementation, jnp.zeros((batch, queries, 16)))
    assert out.shape == (batch, queries, 16)
    assert [grad.shape for grad in grads] == [arg.shape for arg in args]
    assert not any(np.asarray(grad).any() for grad in grads)


@pytest.mark.parametrize("implementation", SLOW_INTERPRETED)
def test_transformations(implementation):
    """vmap over batch, remat and shard_map over batch give what the plain call gives."""
    args = example(batch=4, queries=3)

    def loss(*args):
        return jnp.sin(deform_attn(args[0], SHAPES, *args[1:], implementation=implementation)).sum()

    gradient = jax.grad(loss, (0, 1, 2))
    expected = jax.jit(gradient)(*args)
    split = [arg.reshape(2, 2, *arg.shape[1:]) for arg in args]
    vmapped = [grad.reshape(arg.shape) for grad, arg in zip(jax.jit(jax.vmap(gradient))(*split), args, strict=True)]
    remat = jax.jit(jax.grad(jax.checkpoint(loss), (0, 1, 2)))(*args)
    devices = jax.devices()[:4] if len(jax.devices()) >= 4 else jax.devices()[:1]
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)
    spec = PartitionSpec("data")
    sharded = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=(spec,) * 3, out_specs=(spec,) * 3, check_vma=False))(
        *args
    )
    for got in (vmapped, remat, sharded):
        for actual, wanted in zip(got, expected, strict=True):
            np.testing.assert_allclose(actual, wanted, atol=1e-5)


def test_query_chunks_change_nothing(monkeypatch):
    args = example(queries=37)
    grad_out = jnp.ones((2, 37, 16))
    whole = run(args, SHAPES, "xla", grad_out)
    jax.clear_caches()
    monkeypatch.setattr("esg_jax.ops.deform_attn.xla._CHUNK_BYTES", 8_000)
    monkeypatch.setattr("esg_jax.ops.deform_attn.xla._BLOCK_ROWS", 2_000)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), run(args, SHAPES, "xla", grad_out), whole)
    jax.clear_caches()


@pytest.mark.parametrize("kind", KINDS)
def test_few_queries(kind):
    """Fewer gathered rows than the map has take another XLA form."""
    shapes = ((13, 17), (1, 1), (9, 4))
    values, locations, weights = example(shapes, queries=5)
    assert xla._few_queries(values, weights)
    check_against_reference((values, place(kind, locations, shapes), weights), shapes, "xla")


@pytest.mark.parametrize("kind", KINDS)
def test_packed_form_for_tpu(kind):
    """XLA's form for TPUs, which the dispatcher does not choose on the CPU of this test."""
    values, locations, weights = example()
    args = values, place(kind, locations, SHAPES), weights
    grad_out = np.random.default_rng(2).standard_normal((2, 7, 16), np.float32)
    expected, expected_grads = reference(values, SHAPES, *args[1:], grad_out)
    assert_close(jax.jit(xla.packed_forward, static_argnums=1)(values, SHAPES, *args[1:]), expected, 1e-5)
    grads = jax.jit(xla.packed_backward, static_argnums=1)(values, SHAPES, *args[1:], grad_out)
    for actual, wanted in zip(grads, expected_grads, strict=True):
        assert_close(actual, wanted, 1e-5)


@pytest.mark.parametrize(
    ("options", "dtype", "tolerance"),
    [
        (dict(queries=9, batch=6, heads=1, points=1), jnp.float32, 1e-5),
        (dict(queries=3, batch=1, points=2, channels=64), jnp.bfloat16, 1.5e-2),
    ],
)
def test_pallas_gpu(options, dtype, tolerance):
    """The Mosaic GPU kernel, interpreted off GPU. Every image has another kind of locations: callbacks are slow."""
    shapes = ((3, 5), (1, 1))
    values, locations, weights = example(shapes, **{"channels": 32, **options}, dtype=dtype)
    kinds = KINDS[: len(locations)]
    locations = np.concatenate([place(kind, locations[i : i + 1], shapes) for i, kind in enumerate(kinds)])
    forward = functools.partial(pallas_gpu.forward, interpret=jax.default_backend() != "gpu")
    out = jax.jit(forward, static_argnums=1)(values, shapes, locations, weights)
    assert out.dtype == dtype
    assert_close(out, reference(values, shapes, locations, weights)[0], tolerance)


def test_argument_errors():
    values, locations, weights = example()
    with pytest.raises(ValueError, match="levels"):
        deform_attn(values, SHAPES[:2], locations, weights)
    with pytest.raises(ValueError, match="disagree"):
        deform_attn(values[:1], SHAPES, locations, weights)
    with pytest.raises(ValueError, match="expected values"):
        deform_attn(values[0], SHAPES, locations, weights)
    with pytest.raises(ValueError, match="implementation 'fast'"):
        deform_attn(values, SHAPES, locations, weights, implementation="fast")
