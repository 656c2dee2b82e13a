"""GELLA's association and answer losses against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esg_jax.losses.cropformer import Assignment
from esg_jax.losses.gella import GellaLossConfig, answer_loss, association_loss, association_target
from esg_jax.train.tasks import GroundingTask


@pytest.fixture
def assignment():
    # Image 0: entities 0..2 sit at queries 4, 1, 3; image 1: entity 0 at query 2, the other slots are empty.
    query = jnp.asarray([[4, 1, 3], [2, 0, 0]])
    return Assignment(query, jnp.asarray([[True, True, True], [True, False, False]]))


def links(*pairs):
    out = np.zeros((2, 4, 3), bool)
    for pair in pairs:
        out[pair] = True
    return jnp.asarray(out)


def test_plurals_have_several_entities_and_entities_several_nouns(assignment):
    pairs = [(0, 0, 0), (0, 0, 2), (0, 1, 0), (1, 0, 0), (1, 1, 1)]
    target, occupied = association_target(links(*pairs), assignment, 5)
    expected = np.zeros((2, 4, 5), bool)
    expected[0, 0, [4, 3]] = True  # plural
    expected[0, 1, 4] = True  # the same entity again
    expected[1, 0, 2] = True  # entity 1 of image 1 has no query: nothing
    np.testing.assert_array_equal(target, expected)
    np.testing.assert_array_equal(occupied, [[False, True, False, True, True], [False, False, True, False, False]])


@pytest.mark.parametrize("unmatched", ["negative", "ignore"])
@pytest.mark.parametrize("normalise", ["mean", "per_noun_sum"])
def test_association_loss(assignment, unmatched, normalise):
    logits = np.random.default_rng(0).normal(size=(2, 4, 5)).astype(np.float32)
    pairs = links((0, 0, 0), (0, 0, 2), (0, 1, 0), (1, 0, 0))
    linked = np.asarray(pairs).any(-1)
    config = GellaLossConfig(unmatched=unmatched, normalise=normalise, pos_weight=3.0)
    target, occupied = map(np.asarray, association_target(pairs, assignment, 5))
    probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
    terms = np.where(target, -3 * np.log(probability), -np.log(1 - probability))
    per_noun = []
    for image, noun in np.argwhere(linked):
        row = terms[image, noun][occupied[image]] if unmatched == "ignore" else terms[image, noun]
        per_noun.append(row.mean() if normalise == "mean" else row.sum())
    value = association_loss(jnp.asarray(logits), pairs, jnp.asarray(linked), assignment, config)
    np.testing.assert_allclose(value, np.mean(per_noun), rtol=1e-5)


def test_nouns_without_link_cost_nothing(assignment):
    logits = jnp.ones((2, 4, 5))
    nothing = jnp.zeros((2, 4), bool)
    config = GellaLossConfig()
    assert float(association_loss(logits, links(), nothing, assignment, config)) == 0.0
    grad = jax.grad(lambda x: association_loss(x, links(), nothing, assignment, config))(logits)
    assert not np.asarray(grad).any()


@pytest.mark.parametrize("length", [3, 16, 1030])
def test_answer_loss_equals_the_whole_sequence_at_once(length):
    rng = np.random.default_rng(1)
    hidden = jnp.asarray(rng.normal(size=(2, length, 8)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(8, 11)), jnp.float32)
    ids = jnp.asarray(rng.integers(0, 11, (2, length)))
    answer = jnp.asarray(rng.random((2, length)) < 0.4).at[:, 1].set(True)
    value, grad = jax.value_and_grad(lambda h: answer_loss(lambda x: x @ h, hidden, ids, answer))(head)

    def direct(h):
        log = jax.nn.log_softmax(hidden[:, :-1] @ h)
        picked = jnp.take_along_axis(log, ids[:, 1:, None], -1)[..., 0]
        return -jnp.sum(picked * answer[:, 1:]) / jnp.sum(answer[:, 1:])

    expected, expected_grad = jax.value_and_grad(direct)(head)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-4, atol=1e-6)


def test_divisors_of_a_batch_with_mixed_tasks():
    """Sample 0 is described, 1 is extracted from, 2 is grounded: each loss is divided by what it is about."""
    label_map = np.zeros((3, 8, 8), np.int16)
    label_map[:, :4, :4], label_map[1:, 4:] = 1, 2
    links = np.zeros((3, 4, 5), bool)
    links[2, 0, 0] = links[2, 1, 1] = True
    answer = np.zeros((3, 6), bool)
    answer[:, 3:] = True
    batch = {
        "image": np.zeros((3, 4, 4, 3), np.uint8), "image_size": np.full((3, 2), 4), "label_map": label_map,
        "map_size": np.full((3, 2), 8), "ids": np.zeros((3, 6), np.int32), "answer": answer,
        "seg_pos": np.zeros((3, 4), np.int32), "seg_valid": np.array([[False] * 4] + [[True] * 4] * 2),
        "links": links, "linked": links.any(-1), "task": np.arange(3), "reconstruct": np.array([False, True, True]),
    }  # fmt: skip
    task = GroundingTask(GellaLossConfig(), num_queries=5)
    inputs = task.inputs(batch)
    assert set(inputs) == set(task.inputs({**batch, "task": np.zeros(3, int)})) >= {"label_map", "reconstruct", "links"}
    divisors = jax.tree.map(float, task.normalizers(jax.tree.map(jnp.asarray, inputs)))
    assert divisors["tokens"] == 9 and divisors["nouns"] == 2 and divisors["image"]["masks"] == 4
    assert divisors["image"]["weights"] == pytest.approx(4 + 0.1 * 6)
    # With one task per step, descriptions leave the masks out altogether.
    del batch["reconstruct"]
    assert "label_map" not in task.inputs(batch) and "label_map" in task.inputs({**batch, "task": np.full(3, 2)})


def test_bad_switches_are_named():
    with pytest.raises(ValueError, match="loss.unmatched"):
        GellaLossConfig(unmatched="maybe")
    with pytest.raises(ValueError, match="loss.normalise"):
        GellaLossConfig(normalise="none")
