"""The whole GELLA at tiny size: shapes, what depends on what, and every loss through a training step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esg_jax.losses.cropformer import LossConfig
from esg_jax.losses.gella import GellaLossConfig
from esg_jax.models.backbones.frozen_norm import FrozenBatchNorm
from esg_jax.models.backbones.mobilenet_v2 import MobileNetV2Config
from esg_jax.models.gella import Gella
from esg_jax.models.gella.entity_variants import EntityBlocksConfig, RoiAlignConfig
from esg_jax.sharding import make_mesh
from esg_jax.train.optim import OptimConfig
from esg_jax.train.state import ModelDef
from esg_jax.train.step import TrainStep
from esg_jax.train.tasks import GroundingTask

pytestmark = pytest.mark.slow
LENGTH, NOUNS = 24, 3


@pytest.fixture(scope="module")
def config(tiny_gella_config):
    """Batch statistics, so that devices have something to agree on; only steps see them."""
    encoder = MobileNetV2Config(train_affine=True, batch_statistics=True)
    entities = dataclasses.replace(tiny_gella_config.entities, colormap_encoder=encoder)
    return dataclasses.replace(tiny_gella_config, entities=entities)


@pytest.fixture(scope="module")
def model(config):
    return Gella(config, rngs=nnx.Rngs(0))


def make_batch(config, size=4, seed=0):
    rng = np.random.default_rng(seed)
    side, places = config.colormap.size, config.grid**2
    label_map = np.zeros((size, side, side), np.int16)
    for row in range(size):
        for entity in range(1, 4):
            y, x = rng.integers(0, side - 20, 2)
            label_map[row, y : y + 20, x : x + 20] = entity
    ids = rng.integers(3, 40, (size, LENGTH + places)).astype(np.int32)
    ids[:, 2 : 2 + places] = config.image_id
    seg_pos = np.tile(2 + places + np.array([6, 10, 14], np.int32), (size, 1))
    np.put_along_axis(ids, seg_pos, config.seg_id, axis=1)
    answer = np.zeros(ids.shape, bool)
    answer[:, 2 + places + 4 : -3] = True
    links = np.zeros((size, NOUNS, config.num_queries), bool)
    links[:, 0, 0] = links[:, 1, 1] = links[:, 1, 2] = True
    return {
        "image": rng.integers(0, 256, (size, config.image_size, config.image_size, 3), np.uint8),
        "image_size": np.tile(np.array([config.image_size, config.image_size - 8], np.int32), (size, 1)),
        "label_map": label_map,
        "ids": ids,
        "answer": answer,
        "seg_pos": seg_pos,
        "seg_valid": np.ones((size, NOUNS), bool),
        "links": links,
        "linked": links.any(-1),
    }


def test_forward_shapes_and_padding(config, model):
    batch = make_batch(config, 2)

    @nnx.jit
    def run(model, batch):
        vision = model.vision_tokens(batch["image"], batch["image_size"])
        out = model.entities(vision, batch["label_map"], jax.random.split(jax.random.key(0), 2))
        hidden = model.text(vision, batch["ids"])
        return vision, out, model.associate(model.noun_states(hidden, batch["seg_pos"]), out.embed)

    vision, out, logits = run(model, batch)
    queries = config.num_queries
    assert vision.shape[:3] == (2, config.grid, config.grid)
    assert out.embed.shape == (2, queries, config.entities.mask_decoder.hidden_dim)
    assert out.masks.image_mask_logits().shape == (2, 1, queries, config.colormap.size // 4, config.colormap.size // 4)
    assert logits.shape == (2, NOUNS, queries) and logits.dtype == jnp.float32
    assert np.abs(logits).max() < 2, "fresh association logits should be small"
    painted = dict(batch, image=batch["image"].copy())
    painted["image"][:, :, -8:] = 0  # the padding
    np.testing.assert_array_equal(run(model, painted)[0], vision)


def test_finer_grid_and_pooled_tokens(config):
    """MobileNetV2's last two maps side by side; the language model sees their means over squares."""
    fine = dataclasses.replace(config, vision=MobileNetV2Config(), image_size=64, vision_stride=16, token_pooling=2)
    assert (fine.grid, fine.num_image_tokens) == (4, 4)
    model = Gella(fine, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    image, size = rng.integers(0, 256, (1, 64, 64, 3), np.uint8), np.array([[64, 64]], np.int32)
    coarse = Gella(dataclasses.replace(fine, vision_stride=32, token_pooling=1), rngs=nnx.Rngs(0))
    for some in (model, coarse):  # so that random weights do not forget the image
        for _, node in nnx.iter_modules(some.visual.image_encoder):
            if isinstance(node, FrozenBatchNorm):
                node.scale[...] *= 2.2
    vision, last = (nnx.jit(lambda m: m.vision_tokens(image, size))(m) for m in (model, coarse))
    assert np.abs(last).max() > 1e-2 and np.ptp(last, axis=(1, 2)).max() > 1e-3
    assert vision.shape == (1, 4, 4, 96 + 320) and last.shape == (1, 2, 2, 320)
    for row, column in ((0, 0), (1, 1), (0, 2), (3, 1)):
        np.testing.assert_array_equal(vision[0, row, column, 96:], last[0, row // 2, column // 2])
    ids = np.full((1, 6), 5, np.int32)
    ids[0, 1:5] = fine.image_id
    grid = rng.normal(size=vision.shape).astype(np.float32)
    embedded = model.embed_text(grid, ids)
    expected = model.projector(grid[:, :2, 2:].mean(axis=(1, 2)))
    assert np.abs(expected - embedded[:, 1]).max() > 1e-3
    np.testing.assert_allclose(embedded[:, 2], expected, atol=1e-5)


def test_nouns_of_the_first_blocks(config):
    blocks = EntityBlocksConfig(dim=32, num_heads=4, ffn_dim=48, num_blocks=0)
    whole = dataclasses.replace(config, entities=RoiAlignConfig(config.num_queries, blocks, bins=2))
    early, batch = dataclasses.replace(whole, noun_blocks=1), make_batch(config, 2)
    losses = [
        run_steps(train_step(model, (1, 1, 1), answer=answer), [batch])[1][0]
        for model, answer in ((whole, 1.0), (early, 1.0), (early, 0.0))
    ]
    nouns, answers = ([terms.get(f"loss_{name}") for terms in losses] for name in ("association", "answer"))
    assert abs(nouns[0] - nouns[1]) > 1e-4 and abs(nouns[1] - nouns[2]) < 1e-6
    assert abs(answers[0] - answers[1]) < 1e-6 and answers[2] is None


def test_configurations_that_do_not_fit(config):
    for change, message in (
        ({"vision_stride": 8}, "vision_stride is 8"),
        ({"vision_stride": 16}, "only backbones have a choice"),
        ({"token_pooling": 3}, "token_pooling is 3; it must divide the grid"),
        ({"noun_blocks": 99}, "noun_blocks is 99"),
        ({"noun_blocks": 0}, "noun_blocks is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(config, **change)


def test_wrong_image_size_is_refused(model):
    with pytest.raises(ValueError, match="image_size"):
        model.vision_tokens(jnp.zeros((1, 40, 32, 3)), jnp.array([[40, 32]]))


def train_step(config, devices, frozen="", accumulate=1, answer=1.0):
    from esg_jax.train.step import StepConfig

    loss = GellaLossConfig(answer=answer, reconstruction=LossConfig(num_points=64, shared_points=True))
    return TrainStep(
        ModelDef(lambda: Gella(config, rngs=nnx.Rngs(0)), frozen=frozen),
        GroundingTask(loss, config.num_queries),
        optim=OptimConfig(learning_rate=1e-3, clip_norm=1.0, schedule="constant"),
        total_steps=10,
        mesh=make_mesh(*devices, devices=jax.devices()[: int(np.prod(devices))]),
        config=StepConfig(accumulate=accumulate),
    )


def run_steps(step, batches):
    state = step.init()
    losses = []
    for batch in batches:
        state, metrics = step(state, batch)
        losses.append({name: float(value) for name, value in metrics.items()})
    return state, losses


@pytest.fixture(scope="module")
def one_device(config):
    return run_steps(train_step(config, (1, 1, 1)), [make_batch(config, 4, seed) for seed in range(2)])


def test_all_losses_are_there_and_weights_move(config, one_device):
    state, losses = one_device
    for terms in losses:
        assert {"loss_answer", "loss_association", "loss_ce", "loss_mask", "loss_dice", "loss_dice_0"} <= set(terms)
        assert all(np.isfinite(value) for value in terms.values())
        total = sum(value for name, value in terms.items() if name.startswith("loss_"))
        np.testing.assert_allclose(terms["loss"], total, rtol=1e-5)
    encoder = "visual.entity_encoder.colormap_encoder"
    for name in ("stem.norm.mean", "blocks.0.depthwise.norm.var", "blocks.16.project.norm.mean"):
        assert (np.asarray(state.constants[f"{encoder}.{name}"]) != name.endswith("var")).all(), f"{name} stands still"


def test_eight_devices_equal_one(config, one_device):
    """Batch statistics too. One step: with random weights attention masks hang on the last digit, so others drift."""
    _, expected = one_device
    _, losses = run_steps(train_step(config, (1, 4, 2)), [make_batch(config, 4, 0)])
    for name, value in expected[0].items():
        np.testing.assert_allclose(losses[0][name], value, rtol=1e-5, err_msg=name)


def test_an_answer_of_weight_zero_is_not_computed(config):
    step = train_step(config, (1, 1, 1), answer=0.0)
    with jax.set_mesh(step.mesh):
        _, metrics = jax.eval_shape(step._run, step.abstract_state, make_batch(config), step.settings)
    assert "loss_association" in metrics and "loss_answer" not in metrics


def test_text_only_batches_and_frozen_weights(config):
    step = train_step(config, (1, 1, 1), frozen=r"^(visual\.image_encoder|llm)\.")
    assert not any(name.startswith(("llm.", "visual.image_encoder.")) for name in step.model.params)
    text = {
        name: value for name, value in make_batch(config, 2).items() if name not in ("label_map", "links", "linked")
    }
    before = step.init()
    llm = np.asarray(before.constants["llm.norm.scale"])
    state, losses = run_steps(step, [text])
    assert set(name for name in losses[0] if name.startswith("loss_")) == {"loss_answer"}
    np.testing.assert_array_equal(state.constants["llm.norm.scale"], llm)
