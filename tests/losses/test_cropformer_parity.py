"""Matching, every loss and every gradient against the reference's training fixture, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esg_jax.interop.convert import to_ours
from esg_jax.interop.families import detect
from esg_jax.losses import cropformer as losses
from esg_jax.losses.cropformer import LossConfig, Points, cropformer_loss
from esg_jax.weights import named_arrays

SLOTS = 10  # more than any item has targets
PREDICTIONS = ["aux0", "aux1", "aux2", "final"]


@pytest.fixture(scope="module")
def golden(shared):
    return np.load(shared("fixtures", "cropformer", "train_dev.npz"))


@pytest.fixture(scope="module")
def model(golden, reference_model):
    return reference_model(golden)


@pytest.fixture(scope="module")
def batch(golden):
    """The two images of the fixture as our loader would batch them."""
    height, width = golden["mid/backbone/input_normalized_padded"].shape[2:]
    image = np.zeros((2, 2, height, width, 3), np.uint8)
    size = np.zeros((2, 2, 2), np.int32)
    masks = np.zeros((2, SLOTS, 2, height, width), bool)
    present, valid = np.zeros((2, SLOTS), bool), np.zeros((2, SLOTS, 2), bool)
    for item in range(2):
        count = len(golden[f"mid/targets/batch/b{item}/labels"])
        masks[item, :count] = golden[f"mid/targets/batch/b{item}/masks"]
        present[item, :count] = True
        views = [golden[f"input/item{item}/image"], golden[f"input/item{item}/image_crop"][0]]
        for view, (pixels, name) in enumerate(zip(views, ("full", "crop"), strict=True)):
            size[item, view] = pixels.shape[1:]
            image[item, view, : pixels.shape[1], : pixels.shape[2]] = pixels.transpose(1, 2, 0)
            valid[item, :count, view] = golden[f"input/item{item}/gt_valid_{name}"]
    masks = np.packbits(masks, axis=-1)
    labels = np.zeros((2, SLOTS), np.int32)
    return {"image": image, "size": size, "masks": masks, "labels": labels, "present": present, "valid": valid}


def matches(golden, level, prediction, item):
    """(query, target) of the reference; targets in its own numbering."""
    prefix = f"mid/match/{level}/{prediction}/b{item}"
    return golden[f"{prefix}/query"], golden[f"{prefix}/target"]


def slot_of_target(batch, level, item):
    """Slots of our batch in the order of the reference's targets: at the image level only valid ones."""
    if level == "batch":
        return np.flatnonzero(batch["present"][item])
    return np.flatnonzero(batch["valid"][item // 2, :, item % 2])


def fixture_points(golden, batch, level):
    """The reference's random points, arranged by our target slots."""
    items, views = (4, 1) if level == "image" else (2, 2)
    shape = (len(PREDICTIONS), items)
    matching = np.zeros((*shape, 128, 2), np.float32)
    candidates = np.zeros((*shape, SLOTS, views, 384, 2), np.float32)
    uniform = np.zeros((*shape, SLOTS, views, 32, 2), np.float32)
    for index, prediction in enumerate(PREDICTIONS):
        prefix = f"mid/rand/{level}/{prediction}"
        row = 0
        for item in range(items):
            matching[index, item] = golden[f"{prefix}/matcher/call{item}"][0]
            slots = slot_of_target(batch, level, item)
            for target in matches(golden, level, prediction, item)[1]:
                for view in range(views):
                    candidates[index, item, slots[target], view] = golden[f"{prefix}/loss/call0"][row]
                    uniform[index, item, slots[target], view] = golden[f"{prefix}/loss/call1"][row]
                    row += 1
    return Points(jnp.asarray(matching), jnp.asarray(candidates), jnp.asarray(uniform))


@pytest.fixture(scope="module")
def points(golden, batch):
    return {level: fixture_points(golden, batch, level) for level in ("image", "batch")}


@pytest.fixture(scope="module")
def result(model, batch, points):
    """Loss, its terms, the predictions and the gradient of every parameter, from one compiled program."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    keys = jax.random.split(jax.random.key(0), 2)
    config = LossConfig(num_points=128)

    def run(params):
        output = nnx.merge(graph, params, rest)(jnp.asarray(batch["image"]), jnp.asarray(batch["size"]))
        total, terms = cropformer_loss(output, jax.tree.map(jnp.asarray, batch), keys, config, points=points)
        return total, (terms, output)

    (total, (terms, output)), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    grads = {".".join(map(str, path)): np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(grads)}
    return {"total": total, "terms": terms, "grads": grads, "output": output}


@pytest.mark.parametrize("level", ["image", "batch"])
def test_matching_is_identical(result, golden, batch, points, level):
    output = result["output"]
    views = 2
    masks = jnp.moveaxis(jnp.asarray(batch["masks"]), 2, 1)
    units = losses.Units(
        features=output.mask_features.reshape(4, *output.mask_features.shape[2:]),
        masks=masks.reshape(4, SLOTS, *masks.shape[3:]),
        labels=jnp.zeros((4, SLOTS), jnp.int32),
        counted=None,
        exhaustive=None,
        views=views,
    )
    joint = level == "batch"
    if joint:
        present = jnp.repeat(jnp.asarray(batch["present"]), views, axis=0)
        decoder = jax.tree.map(lambda x: jnp.repeat(x, views, axis=1), output.batch)
    else:
        present = jnp.moveaxis(jnp.asarray(batch["valid"]), 2, 1).reshape(4, SLOTS)
        decoder = output.image
    fixed = losses._fixed_points(points, [level])
    config = LossConfig(num_points=128)
    for index, prediction in enumerate(PREDICTIONS):
        chosen = losses._select_per_mask(
            losses.Prediction(
                index=jnp.int32(index),
                joint=jnp.asarray(joint),
                logits=decoder.logits[index],
                mask_embed=decoder.mask_embed[index],
                present=present,
                points=jax.tree.map(lambda x, index=index: x[index], fixed),
            ),
            units,
            config,
        )
        if joint:  # all views of an image got the same queries
            np.testing.assert_array_equal(chosen.query[::2], chosen.query[1::2])
            chosen = jax.tree.map(lambda x: x[::2], chosen)
        for item in range(len(chosen.query)):
            query, slot = matches(golden, level, prediction, item)
            expected = dict(zip(slot_of_target(batch, level, item)[slot], query, strict=True))
            actual = {n: int(chosen.query[item, n]) for n in np.flatnonzero(chosen.matched[item])}
            assert actual == expected, (level, prediction, item)


def test_every_loss(result, golden):
    names = {name.removeprefix("out/loss/") for name in golden.files if name.startswith("out/loss/")}
    assert set(result["terms"]) == names
    for name in names:
        np.testing.assert_allclose(result["terms"][name], golden[f"out/loss/{name}"], atol=1e-4, err_msg=name)
    np.testing.assert_allclose(result["total"], golden["out/loss_total"], atol=1e-4 * len(names))


def in_our_names(golden, model, value_of):
    """The fixture's parameters with other values, converted; `value_of` maps (name, parameter) to an array."""
    buffers = ("relative_position_index", "empty_weight")  # recomputed and compared by the converter
    state = {}
    for name in (name.removeprefix("param/") for name in golden.files if name.startswith("param/")):
        parameter = golden[f"param/{name}"]
        state[name] = parameter if name.endswith(buffers) else value_of(name, parameter)
    return to_ours(state, named_arrays(model), detect(state)[1].table)[0]


def test_gradients(result, golden, model):
    """The fixture holds the norm of all gradients and those of parameters from every part of the model.

    Errors are relative to the largest entry of the parameter's gradient.
    """
    norm = np.sqrt(sum(np.sum(np.square(grad)) for grad in result["grads"].values()))
    assert norm == pytest.approx(float(golden["out/grad_global_norm"]), rel=1e-3)

    stored = {name.removeprefix("grad/") for name in golden.files if name.startswith("grad/")}
    expected = in_our_names(
        golden, model, lambda name, x: golden[f"grad/{name}"] if name in stored else np.zeros_like(x)
    )
    known = in_our_names(golden, model, lambda name, x: np.full_like(x, float(name in stored)))
    compared = [name for name in result["grads"] if np.all(known[name] == 1)]
    assert len(compared) >= len(stored)  # packed projections become several parameters
    for name in compared:
        largest = np.abs(expected[name]).max()
        np.testing.assert_allclose(result["grads"][name], expected[name], atol=1e-3 * largest, rtol=0, err_msg=name)
