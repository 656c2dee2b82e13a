"""The alternatives to the colormap: row k is entity k, whatever the others are called; and a training step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esg_jax.config import from_dict, to_dict
from esg_jax.losses.gella import GellaLossConfig
from esg_jax.models.backbones.frozen_norm import FrozenBatchNorm
from esg_jax.models.backbones.mobilenet_v2 import MobileNetV2Config
from esg_jax.models.gella import Gella, GellaConfig
from esg_jax.models.gella.entity_variants import (
    ENTITY_ENCODERS,
    VARIANTS,
    BinaryPoolConfig,
    EntityBlock,
    EntityBlocksConfig,
    MaskAttention,
    MaskAttentionConfig,
    RoiAlignConfig,
    _geometry,
)
from esg_jax.sharding import make_mesh
from esg_jax.train.optim import OptimConfig
from esg_jax.train.state import ModelDef
from esg_jax.train.step import TrainStep
from esg_jax.train.tasks import GroundingTask

BLOCKS = EntityBlocksConfig(dim=32, num_heads=4, ffn_dim=48, num_blocks=1)
TINY = {
    "roi_align": RoiAlignConfig(8, BLOCKS, bins=2),
    "mask_ca_add": MaskAttentionConfig(8, BLOCKS, "add"),
    "mask_ca_mul": MaskAttentionConfig(8, BLOCKS, "multiply"),
    "binary_pool": BinaryPoolConfig(4, BLOCKS, mask_size=32, values=(-1, 1), pooling="cls"),
}


def build(config, channels=16):
    return ENTITY_ENCODERS[type(config)](config, channels, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", TINY)
def test_rows_follow_their_labels(name):
    config = TINY[name]
    model = build(config)
    for _, node in nnx.iter_modules(model):  # so that random weights do not forget their input
        if isinstance(node, FrozenBatchNorm):
            node.scale[...] *= 2.2
    rng = np.random.default_rng(0)
    image = rng.normal(size=(2, 3, 3, 16)).astype(np.float32)
    labels = np.zeros((2, 64, 64), np.int32)
    labels[0, :20, 10:50], labels[0, 30:, 40:], labels[1, 5:40, 5:40] = 1, 3, 2
    run = nnx.jit(lambda model, image, labels: model(image, labels))
    out = run(model, image, labels)
    assert out.masks is None and out.embed.shape == (2, config.num_queries, config.embed_dim)
    assert out.embed.dtype == jnp.float32 and np.isfinite(out.embed).all()
    present = np.array(out.present)
    assert [np.flatnonzero(row).tolist() for row in present] == [[0, 2], [1]]
    order = np.array([0, 4, 2, 1, 3])  # new label of every old one
    renamed = run(model, image, order[labels].astype(np.int32))
    for image_index, row in zip(*np.nonzero(present), strict=True):
        ours = renamed.embed[image_index, order[row + 1] - 1]
        np.testing.assert_allclose(ours, out.embed[image_index, row], atol=1e-5)
    assert np.abs(out.embed[0, 0] - out.embed[0, 2]).max() > 1e-3


def test_rows_without_entity_are_not_seen():
    block = EntityBlock(BLOCKS, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    x, image, position = (rng.normal(size=shape).astype(np.float32) for shape in ((1, 4, 32), (1, 5, 32), (5, 32)))
    absent = np.array([[False, True, False, True]])
    run = nnx.jit(lambda x, absent: block(x, image, position, absent, None))
    other = np.where(absent[..., None], 9.0, x).astype(np.float32)
    np.testing.assert_allclose(run(x, absent)[:, ::2], run(other, absent)[:, ::2], atol=1e-6)
    assert np.isfinite(run(x, np.ones((1, 4), bool))).all()


def test_masks_change_the_logits():
    share = np.array([[[0.0, 0.5, 1.0]]], np.float32)
    logits = np.full((1, 2, 1, 3), 3.0, np.float32)
    for operation, wanted in (("add", [3, 4, 5]), ("multiply", [0, 3, 6])):
        config = MaskAttentionConfig(1, BLOCKS, operation, mask_gain=2.0)
        model = nnx.eval_shape(lambda config=config: MaskAttention(config, 16, rngs=nnx.Rngs(0)))
        np.testing.assert_allclose(model.rescore(share)(logits)[0, 1, 0], wanted)


def test_geometry():
    """In a blank image, place and size are all that tells entities apart."""
    labels = np.zeros((1, 64, 64), np.int32)
    labels[0, :16, 32:], labels[0, 16:32, 32:], labels[0, 40:48, :32] = 1, 2, 3
    np.testing.assert_allclose(
        _geometry(labels, np.array([[512, 512, 256, 0]]))[0, :3, :7],
        [
            [0.5, 0, 1, 0.25, 0.5, 0.25, 0.125**0.5],
            [0.5, 0.25, 1, 0.5, 0.5, 0.25, 0.125**0.5],
            [0, 0.625, 0.5, 0.75, 0.5, 0.125, 0.25],
        ],
    )
    for geometry in (False, True):
        model = build(MaskAttentionConfig(4, dataclasses.replace(BLOCKS, geometry=geometry), mask_gain=0.0))
        embed = nnx.jit(lambda model, *x: model(*x).embed)(model, np.zeros((1, 4, 4, 16), np.float32), labels)[0]
        assert (np.abs(embed[0] - embed[1]).max() > 1e-2) == (np.abs(embed[0] - embed[2]).max() > 1e-2) == geometry


def test_values_of_binary_masks():
    labels = jnp.array([[0, 1], [2, 0]])
    for values, low, high in (((0, 1), 0, 1), ((-1, 1), -1, 1), ((0, 255), -103.53 / 57.375, (255 - 103.53) / 57.375)):
        model = nnx.eval_shape(lambda v=values: build(BinaryPoolConfig(2, BLOCKS, mask_size=32, values=v)))
        masks = model._masks(labels)
        assert masks.shape == (2, 2, 2, 3)
        np.testing.assert_allclose(masks[1, :, :, 2], [[low, low], [high, low]], rtol=1e-5)


@pytest.mark.parametrize("pooling", ["avg", "conv14"])
def test_pooling_shapes(pooling):
    model = nnx.eval_shape(lambda: build(BinaryPoolConfig(5, BLOCKS, pooling=pooling)))
    arrays = (jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (((1, 3, 3, 16), "f4"), ((1, 64, 64), "i2")))
    assert nnx.eval_shape(lambda m, x, y: m(x, y), model, *arrays).embed.shape == (1, 5, 32)
    if pooling == "conv14":
        assert model.pool.kernel.shape == (14, 14, 320, 32)


def test_configurations(tiny_gella_config):
    for config in VARIANTS.values():
        whole = GellaConfig(entities=config)
        assert from_dict(GellaConfig, to_dict(whole)) == whole
        assert whole.num_queries == 100 and whole.entities.embed_dim == 256
    for make, message in (
        (lambda: BinaryPoolConfig(values=(0, 2)), r"entities.values are \(0, 2\)"),
        (lambda: BinaryPoolConfig(pooling="max"), "entities.pooling is 'max'"),
        (lambda: BinaryPoolConfig(pooling="conv14", mask_size=224), "a 14 x 14 convolution needs 448"),
        (lambda: BinaryPoolConfig(encoder=MobileNetV2Config(batch_statistics=True)), "need fixed statistics"),
        (lambda: BinaryPoolConfig(mask_size=100), "entities.mask_size is 100"),
        (lambda: MaskAttentionConfig(operation="max"), "entities.operation is 'max'"),
        (lambda: MaskAttentionConfig(blocks=EntityBlocksConfig(num_blocks=0)), "entities.blocks.num_blocks is 0"),
        (lambda: GellaConfig(entities=RoiAlignConfig(), llm=None), "RoiAlignConfig reconstructs no masks"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.slow
def test_training_step(tiny_gella_config):
    """On four devices; association and answers are the only losses, and both reach the new weights."""
    config = dataclasses.replace(tiny_gella_config, entities=TINY["mask_ca_add"])
    places, size = config.grid**2, 4
    ids = np.full((size, 8 + places), 5, np.int32)
    ids[:, 1 : 1 + places], ids[:, 4 + places] = config.image_id, config.seg_id
    label_map = np.zeros((size, 64, 64), np.int16)
    label_map[:, 4:30, 4:30], label_map[:, 40:, 10:] = 1, 2
    links = np.zeros((size, 1, 8), bool)
    links[:, 0, 1] = True
    batch = {
        "image": np.random.default_rng(0).integers(0, 256, (size, 32, 32, 3), np.uint8),
        "image_size": np.full((size, 2), 32, np.int32),
        "label_map": label_map,
        "map_size": np.full((size, 2), 64, np.int32),
        "ids": ids,
        "answer": np.arange(ids.shape[1])[None].repeat(size, 0) > places + 2,
        "seg_pos": np.full((size, 1), 4 + places, np.int32),
        "seg_valid": np.ones((size, 1), bool),
        "links": links,
        "linked": np.ones((size, 1), bool),
    }
    step = TrainStep(
        ModelDef(lambda: Gella(config, rngs=nnx.Rngs(0))),
        GroundingTask(GellaLossConfig(), config.num_queries),
        optim=OptimConfig(learning_rate=1e-3, clip_norm=1.0, schedule="constant", weight_decay=0.0),
        total_steps=10,
        mesh=make_mesh(1, 4, 1, devices=jax.devices()[:4]),
    )
    state = step.init()
    before = jax.device_get(state.params)
    state, metrics = step(state, batch)
    assert {name for name in metrics if name.startswith("loss_")} == {"loss_answer", "loss_association"}
    # Fresh logits are near 0; only the two rows with an entity count.
    np.testing.assert_allclose(metrics["loss_association"], np.log(2), atol=0.1)
    still = [name for name, value in state.params.items() if np.array_equal(value, before[name])]
    assert not [name for name in still if "entity_encoder" in name and not name.endswith("key.bias")], still
