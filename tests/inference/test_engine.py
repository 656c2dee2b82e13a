"""Where weights lie and how batches are split, with a network of one matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from esg_jax.inference.engine import Engine, fill, read_ahead
from esg_jax.sharding import Layout, make_mesh, parse_mesh, pin_batch

RULES = ((r"kernel$", P("fsdp", "model")), (r"", P()))
X = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    return nnx.Linear(16, 32, rngs=nnx.Rngs(0))


def product(model, x):
    return pin_batch(model(x))


def test_placed_by_the_rules_and_computed_everywhere_alike(model):
    one, many = Engine(model), Engine(model, make_mesh(2, 2, 2), RULES)
    assert one.mesh.size == 1 and many.mesh.shape == {"data": 2, "fsdp": 2, "model": 2}
    assert many.state["kernel"].get_value().sharding.spec == P("fsdp", "model")
    expected = one.fetch(one.whole_batch(product)(X))
    for engine in (one, many):
        for program in (
            engine.whole_batch(product),
            engine.per_image(lambda model, x: model(x), part=lambda model: model),
        ):
            out = program(X)
            np.testing.assert_allclose(engine.fetch(out), expected, atol=1e-6)
            assert out.sharding.shard_shape(out.shape)[0] == 8 // engine.batch_size(1)
            assert program.num_variants == 1
    doubled = many.per_image(lambda x: 2 * x)
    np.testing.assert_array_equal(many.fetch(doubled(doubled(X))), 4 * X)  # device arrays go on where they are


def test_weights_on_a_mesh_stay(model):
    layout = Layout(make_mesh(1, 4, 2), RULES)
    placed = nnx.clone(model)
    for name in ("kernel", "bias"):
        array = getattr(model, name).get_value()
        setattr(placed, name, nnx.Param(jax.device_put(array, layout(name, array.shape))))
    engine = Engine(placed)
    assert engine.mesh == layout.mesh
    assert engine.state["kernel"].get_value() is placed.kernel.get_value()


def test_static_values_choose_a_program(model):
    program = Engine(model).whole_batch(lambda model, x, *, power: model(x) ** power)
    square, cube = program(X, power=2), program(X, power=3)
    np.testing.assert_allclose(cube, square * Engine(model).whole_batch(product)(X), rtol=1e-5)
    assert program.num_variants == 2


def test_batches_divide_over_the_devices(model):
    engine = Engine(model, make_mesh(2, 4, 1))
    assert [engine.batch_size(count) for count in (1, 8, 9)] == [8, 8, 16]
    assert engine.own_rows(16) == range(16)
    assert Engine(model, make_mesh(1, 2, 4)).batch_size(1) == 2


def test_what_does_not_fit_is_named(model):
    with pytest.raises(ValueError, match=r"splits dimension 0 of 'kernel' with shape \(16, 32\) in 3"):
        Engine(model, make_mesh(1, 3, 1, devices=jax.devices()[:3]), RULES)
    with pytest.raises(ValueError, match="expected three numbers DATA,FSDP,MODEL"):
        parse_mesh("4x2")
    with pytest.raises(ValueError, match=r"\(2, 2, 1\) need 4 devices, but there are 8"):
        parse_mesh("2,2,1")


def test_items_are_read_ahead_in_order():
    read = []

    def load(item):
        read.append(item)
        return item**2

    results = read_ahead(load, range(10), num_threads=2)
    assert next(results) == 0 and max(read) <= 3
    assert list(results) == [k**2 for k in range(1, 10)]
    np.testing.assert_array_equal(fill(jnp.arange(2), 4), [0, 1, 1, 1])
