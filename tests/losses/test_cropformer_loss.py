"""Properties of the losses that the reference's fixture does not show, on made-up predictions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esg_jax.losses.cropformer import LossConfig, cropformer_loss, loss_normalizers
from esg_jax.models.cropformer import CropFormerOutput
from esg_jax.models.cropformer.mask_decoder import DecoderOutput

IMAGES, VIEWS, QUERIES, SLOTS, CHANNELS, SIDE = 2, 2, 3, 5, 4, 8
CONFIG = LossConfig(num_points=16)


def decoder(rng, items, classes):
    return DecoderOutput(
        logits=rng.normal(size=(2, items, QUERIES, classes + 1)).astype(np.float32),
        mask_embed=rng.normal(size=(2, items, QUERIES, CHANNELS)).astype(np.float32),
    )


def predictions(views=VIEWS, classes=1):
    rng = np.random.default_rng(0)
    return CropFormerOutput(
        image=decoder(rng, IMAGES * views, classes),
        batch=decoder(rng, IMAGES, classes) if views > 1 else None,
        mask_features=rng.normal(size=(IMAGES, views, SIDE, SIDE, CHANNELS)).astype(np.float32),
    )


def targets(counts, views=VIEWS, classes=1):
    """`counts` entities per image in arbitrary slots; the other slots hold rubbish."""
    rng = np.random.default_rng(1)
    present = np.zeros((IMAGES, SLOTS), bool)
    for row, count in zip(present, counts, strict=True):
        row[rng.permutation(SLOTS)[:count]] = True
    return {
        "masks": rng.integers(0, 256, (IMAGES, SLOTS, views, 4 * SIDE, 4 * SIDE // 8)).astype(np.uint8),
        "labels": rng.integers(0, classes, (IMAGES, SLOTS)).astype(np.int32),
        "present": present,
        "valid": np.ones((IMAGES, SLOTS, views), bool),
    }


@pytest.fixture(scope="module", params=[False, True], ids=["per_mask", "shared_points"])
def evaluate(request):
    """(total, terms), gradients; compiled once per kind of points for all tests."""
    config = dataclasses.replace(CONFIG, shared_points=request.param)

    @jax.jit
    def run(output, batch, keys, normalizers):
        def loss(output):
            return cropformer_loss(output, batch, keys, config, normalizers=normalizers)

        return jax.value_and_grad(loss, has_aux=True)(output)

    def call(output, batch, normalizers=None, images=slice(None)):
        normalizers = normalizers or loss_normalizers(batch, QUERIES, config)
        return run(output, batch, jax.random.split(jax.random.key(0), IMAGES)[images], normalizers)

    return call


def finite(tree):
    return all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(tree))


def test_absent_slots_change_nothing(evaluate):
    output, batch = predictions(), targets([2, 1])
    (total, _), grads = evaluate(output, batch)
    absent = ~batch["present"]
    other = {name: value.copy() for name, value in batch.items()}
    other["masks"][absent] = 255 - other["masks"][absent]
    other["valid"][absent] = False
    (again, _), other_grads = evaluate(output, other)
    np.testing.assert_allclose(total, again, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, other_grads)


def test_images_without_entities(evaluate):
    output = predictions()
    (total, terms), grads = evaluate(output, targets([0, 0]))
    assert finite((total, terms, grads))
    for name, value in terms.items():
        assert (value == 0) == ("_ce" not in name), name
    # All queries are no-object, so the weighted mean is the plain mean.
    expected = -CONFIG.class_weight * jax.nn.log_softmax(output.batch.logits[-1])[..., -1].mean()
    np.testing.assert_allclose(terms["loss_ce_3d"], expected, rtol=1e-5)


def test_more_entities_than_queries(evaluate):
    (total, _), grads = evaluate(predictions(), targets([SLOTS, 1]))
    assert finite((total, grads))


@pytest.mark.parametrize("flags", [{}, {"exhaustive": np.array([False, True])}], ids=["plain", "partial"])
def test_parts_of_a_batch_add_up(evaluate, flags):
    """With the normalizers of the whole batch, losses and gradients are sums over images."""
    output, batch = predictions(), {**targets([2, 1]), **flags}
    normalizers = loss_normalizers(batch, QUERIES, CONFIG)
    (total, terms), grads = evaluate(output, batch, normalizers)
    parts, part_grads = [], []
    for b in range(IMAGES):
        image, views = slice(b, b + 1), slice(b * VIEWS, (b + 1) * VIEWS)
        part = CropFormerOutput(
            image=jax.tree.map(lambda x, views=views: x[:, views], output.image),
            batch=jax.tree.map(lambda x, image=image: x[:, image], output.batch),
            mask_features=output.mask_features[image],
        )
        value, grad = evaluate(part, {k: v[image] for k, v in batch.items()}, normalizers, image)
        parts.append(value)
        part_grads.append(grad.mask_features)
    np.testing.assert_allclose(sum(part[0] for part in parts), total, rtol=1e-5)
    for name, value in terms.items():
        np.testing.assert_allclose(sum(part[1][name] for part in parts), value, rtol=1e-4, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(np.concatenate(part_grads), grads.mask_features, atol=1e-5)


def test_images_that_do_not_count(evaluate):
    """They cost nothing and divide nothing: the rest has the loss that it has alone."""
    output, batch = predictions(), targets([2, 0])
    (total, terms), grads = evaluate(output, {**batch, "counted": np.array([True, False])})
    first = CropFormerOutput(
        image=jax.tree.map(lambda x: x[:, :VIEWS], output.image),
        batch=jax.tree.map(lambda x: x[:, :1], output.batch),
        mask_features=output.mask_features[:1],
    )
    (alone, alone_terms), _ = evaluate(first, {k: v[:1] for k, v in batch.items()}, None, slice(0, 1))
    np.testing.assert_allclose(total, alone, rtol=1e-5)
    for name, value in terms.items():
        np.testing.assert_allclose(value, alone_terms[name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert not np.asarray(grads.mask_features)[1].any() and not np.asarray(grads.batch.logits)[:, 1].any()
    nothing = {**targets([0, 0]), "counted": np.zeros(2, bool)}
    (total, _), grads = evaluate(output, nothing)
    assert float(total) == 0 and finite(grads)


def test_unlabelled_objects_cost_nothing(evaluate):
    """An image that is not exhaustive pays for its targets only: unmatched queries may say what they like."""
    output, batch = predictions(), targets([2, 1])
    partial = {**batch, "exhaustive": np.array([True, False])}
    (total, terms), grads = evaluate(output, partial)
    for level, count, items in (("image", VIEWS, slice(VIEWS, None)), ("batch", 1, slice(1, None))):
        pushed = np.abs(np.asarray(getattr(grads, level).logits)[:, items]).max(-1) > 0
        # One target per view and per image, in both predictions: one query of each is charged.
        assert pushed.shape == (2, count, QUERIES) and (pushed.sum(-1) == 1).all()
    # The first image pays for everything, as ever.
    assert (np.abs(np.asarray(grads.batch.logits)[:, 0]).max(-1) > 0).all()
    # What queries without a target say is free. More of "no object" leaves the matching as it is.
    free = np.abs(np.asarray(grads.batch.logits)).max(-1) == 0
    assert free.sum() == 2 * (QUERIES - 1)
    louder = np.where(free[..., None], output.batch.logits + np.float32([0, 3]), output.batch.logits)
    other = dataclasses.replace(output, batch=dataclasses.replace(output.batch, logits=louder))
    (again, again_terms), _ = evaluate(other, partial)
    np.testing.assert_allclose(again, total, rtol=1e-6)
    assert float(again_terms["loss_ce_3d"]) == pytest.approx(float(terms["loss_ce_3d"]), rel=1e-6)


def test_exhaustive_images_are_charged_as_ever(evaluate):
    """The flag changes no bit where it is set; masks never depend on it."""
    output, batch = predictions(), targets([2, 1])
    plain = evaluate(output, batch)
    marked = evaluate(output, {**batch, "exhaustive": np.ones(IMAGES, bool)})
    jax.tree.map(np.testing.assert_array_equal, plain, marked)
    (_, terms), _ = evaluate(output, {**batch, "exhaustive": np.zeros(IMAGES, bool)})
    for name, value in plain[0][1].items():
        assert (float(terms[name]) == float(value)) == ("_ce" not in name), name


def test_normalizers():
    batch = targets([2, SLOTS])
    batch["valid"][0, :, 1] = False
    values = jax.tree.map(float, loss_normalizers(batch, QUERIES, CONFIG))
    # Image level: 2 + 0 + 5 + 5 visible entities; batch level: each entity once, visible or not.
    assert values["image"]["masks"] == 12 and values["batch"]["masks"] == 2 + SLOTS
    # Three queries per item: 2, 0, 3 and 3 of them matched at most.
    assert values["image"]["weights"] == pytest.approx(8 + 0.1 * 4)
    assert values["batch"]["weights"] == pytest.approx(5 + 0.1 * 1)
    partial = loss_normalizers({**batch, "exhaustive": np.array([False, True])}, QUERIES, CONFIG)
    assert float(partial["image"]["weights"]) == pytest.approx(8)
    assert float(partial["batch"]["weights"]) == pytest.approx(5)
    assert float(partial["image"]["masks"]) == 12
    assert float(loss_normalizers(targets([0, 0]), QUERIES, CONFIG)["batch"]["masks"]) == 1


def test_several_classes_without_views():
    """Masks decide the matching here, so exchanged labels change the classification loss and nothing else."""
    side = SIDE
    maps = np.zeros((IMAGES, 1, side, side, CHANNELS), np.float32)
    maps[:, 0, :, : side // 2, 0], maps[:, 0, :, side // 2 :, 1] = 1, 1
    embed = np.zeros((1, IMAGES, QUERIES, CHANNELS), np.float32)
    embed[..., 0, :2], embed[..., 1, :2], embed[..., 2, :2] = (-50, 50), (50, -50), (-50, -50)
    masks = np.zeros((IMAGES, SLOTS, 1, 4 * side, 4 * side), bool)
    masks[:, 1, 0, :, : 2 * side], masks[:, 3, 0, :, 2 * side :] = True, True
    batch = {
        "masks": np.packbits(masks, axis=-1),
        "labels": np.array([[0, 2, 0, 1, 0]] * IMAGES, np.int32),
        "present": np.array([[False, True, False, True, False]] * IMAGES),
        "valid": np.ones((IMAGES, SLOTS, 1), bool),
    }
    keys = jax.random.split(jax.random.key(0), IMAGES)

    def losses(labels):
        logits = 50 * np.eye(4, dtype=np.float32)[np.array(labels)]
        logits = np.broadcast_to(logits, (1, IMAGES, QUERIES, 4))
        return cropformer_loss(CropFormerOutput(DecoderOutput(logits, embed), None, maps), batch, keys, CONFIG)[1]

    right, wrong = losses([1, 2, 3]), losses([2, 1, 3])
    assert set(right) == {"loss_ce", "loss_mask", "loss_dice"}
    assert right["loss_ce"] < 1e-6
    # Two of three queries are wrong by 50; the third, no-object, is right and weighs 0.1.
    np.testing.assert_allclose(wrong["loss_ce"], CONFIG.class_weight * 100 / 2.1, rtol=1e-4)
    for name in ("loss_mask", "loss_dice"):
        np.testing.assert_allclose(wrong[name], right[name], rtol=1e-5)
