"""Nouns are tied to entities, not to colours: after matching, the association survives a new draw of colours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esg_jax.inference.grounding.decisions import entity_scores, match_queries
from esg_jax.losses.cropformer import LossConfig
from esg_jax.losses.gella import GellaLossConfig
from esg_jax.models.gella import Gella
from esg_jax.sharding import make_mesh
from esg_jax.train.optim import OptimConfig
from esg_jax.train.state import ModelDef
from esg_jax.train.step import TrainStep
from esg_jax.train.tasks import GroundingTask

pytestmark = pytest.mark.slow
STEPS, NOUNS = 200, 4


def make_batch(config):
    """Four images, each with an entity in every quarter; noun k means the one in quarter k, whatever its number."""
    rng = np.random.default_rng(0)
    side, places = config.colormap.size, config.grid**2
    half = side // 2
    label_map = np.zeros((4, side, side), np.int16)
    links = np.zeros((4, NOUNS, config.num_queries), bool)
    for image in range(4):
        for quarter, entity in enumerate(rng.permutation(NOUNS)):
            height, width = rng.integers(half - 12, half - 3, 2)
            top, left = half * (quarter // 2) + 2, half * (quarter % 2) + 2
            label_map[image, top : top + height, left : left + width] = entity + 1
            links[image, quarter, entity] = True
    nouns = np.array([[3 + quarter, config.seg_id] for quarter in range(NOUNS)]).ravel()
    ids = np.concatenate([[1], np.full(places, config.image_id), nouns, [2]]).astype(np.int32)
    answer = np.arange(len(ids)) > places
    return {
        "image": np.full((4, config.image_size, config.image_size, 3), 128, np.uint8),
        "image_size": np.full((4, 2), config.image_size, np.int32),
        "label_map": label_map,
        "ids": np.tile(ids, (4, 1)),
        "answer": np.tile(answer, (4, 1)),
        "seg_pos": np.tile(np.flatnonzero(ids == config.seg_id).astype(np.int32), (4, 1)),
        "seg_valid": np.ones((4, NOUNS), bool),
        "links": links,
        "linked": np.ones((4, NOUNS), bool),
    }


@pytest.fixture(scope="module")
def trained(tiny_gella_config):
    """Batch, and a function from a seed of colours to (association logits, mask logits)."""
    config, batch = tiny_gella_config, make_batch(tiny_gella_config)
    loss = GellaLossConfig(association=4.0, reconstruction=LossConfig(num_points=256, shared_points=True))
    step = TrainStep(
        ModelDef(lambda: Gella(config, rngs=nnx.Rngs(0)), frozen=r"image_encoder"),
        GroundingTask(loss, config.num_queries),
        optim=OptimConfig(learning_rate=3e-3, clip_norm=1.0, warmup_steps=10, weight_decay=0.0),
        total_steps=STEPS,
        mesh=make_mesh(1, 1, 1, devices=jax.devices()[:1]),
    )
    state = step.init()
    for _ in range(STEPS):
        state, metrics = step(state, batch)
    print({name: round(float(value), 3) for name, value in metrics.items() if "_0" not in name})

    @jax.jit
    def predict(key):
        model = step.model.merge(state.params, state.constants)
        vision = model.vision_tokens(batch["image"], batch["image_size"])
        output = model.entities(vision, jnp.asarray(batch["label_map"]), jax.random.split(key, 4))
        nouns = model.noun_states(model.text(vision, batch["ids"]), batch["seg_pos"])
        return model.associate(nouns, output.embed), output.masks.image_mask_logits()[:, 0]

    return batch, lambda seed: jax.device_get(predict(jax.random.key(seed)))


def scores_of(batch, logits_bvq, masks_bqhw):
    """S (b, nouns, entities) after matching queries to entities by IoU, and the queries."""
    scores, queries = [], []
    for logits, masks, labels in zip(logits_bvq, masks_bqhw > 0, batch["label_map"][:, 2::4, 2::4], strict=True):
        truth = labels == np.arange(1, NOUNS + 1)[:, None, None]
        both = np.einsum("qhw,nhw->qn", masks.astype(int), truth.astype(int))
        union = masks.sum((1, 2))[:, None] + truth.sum((1, 2)) - both
        queries.append(match_queries(both / np.maximum(union, 1), 0.5))
        scores.append(entity_scores(logits, queries[-1]))
    return np.stack(scores), np.stack(queries)


def test_new_colours_leave_the_association(trained):
    batch, predict = trained
    wanted = batch["links"][:, :, :NOUNS].argmax(-1)
    draws = [scores_of(batch, *predict(seed)) for seed in range(4)]
    for scores, queries in draws:
        assert (queries >= 0).all(), "an entity was not found again"
        np.testing.assert_array_equal(scores.argmax(-1), wanted)
    spread = np.ptp([scores for scores, _ in draws], axis=0)
    print(f"scores of the same pair differ by {spread.mean():.3f} on average, {spread.max():.3f} at most")
    assert spread.mean() < 0.1
