"""The vision branch learns to give back the masks of a colormap: overfitted on four synthetic images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esg_jax.losses.cropformer import LossConfig
from esg_jax.losses.gella import GellaLossConfig
from esg_jax.models.backbones.mobilenet_v2 import MobileNetV2Config
from esg_jax.models.cropformer.mask_decoder import MaskDecoderConfig
from esg_jax.models.cropformer.pixel_decoder import PixelDecoderConfig
from esg_jax.models.gella import Gella, GellaConfig
from esg_jax.models.gella.colormap import ColormapConfig
from esg_jax.models.gella.entity_encoder import EntityEncoderConfig
from esg_jax.models.gella.resoblend import ResoBlendConfig
from esg_jax.models.language.clip import ClipVisionConfig
from esg_jax.ops.resize import resize_bilinear
from esg_jax.sharding import make_mesh
from esg_jax.train.optim import OptimConfig
from esg_jax.train.state import ModelDef
from esg_jax.train.step import TrainStep
from esg_jax.train.tasks import GroundingTask

pytestmark = pytest.mark.slow
SIDE, QUERIES, STEPS = 96, 10, 650


def make_batch():
    """Four images: two entities in alternate stripes of one feature cell, under three ellipses or boxes."""
    rng = np.random.default_rng(0)
    label_map = np.zeros((4, SIDE, SIDE), np.int16)
    y, x = np.mgrid[:SIDE, :SIDE]
    for number, row in enumerate(label_map):
        top, left = 4 * rng.integers(0, (SIDE - 56) // 4, 2)
        stripes = 1 + ((y if number % 2 else x) // 4) % 2
        block = (slice(top, top + 56), slice(left, left + 56))
        row[block] = stripes[block]
        for entity in (3, 4, 5):
            (cy, cx), (ry, rx) = rng.uniform(10, SIDE - 10, 2), rng.uniform(8, 16, 2)
            round_shape = ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1
            row[round_shape if rng.random() < 0.5 else (abs(y - cy) < ry) & (abs(x - cx) < rx)] = entity
    image = rng.integers(0, 256, (4, 32, 32, 3), np.uint8)
    return {"image": image, "image_size": np.full((4, 2), 32, np.int32), "label_map": label_map}


def overfit(mode):
    """A function from a seed of colours to (logits at full size, E_vc) of the four images."""
    config = GellaConfig(
        entities=EntityEncoderConfig(
            MobileNetV2Config(train_affine=True),
            ResoBlendConfig(mode=mode, dim=32, num_heads=4, ffn_dim=64),
            PixelDecoderConfig(conv_dim=32, mask_dim=32, num_layers=1, num_heads=4, ffn_dim=64),
            MaskDecoderConfig(hidden_dim=32, mask_dim=32, num_heads=4, ffn_dim=64, num_layers=2, num_queries=QUERIES),
        ),
        vision=ClipVisionConfig.tiny(),
        image_size=32,
        colormap=ColormapConfig(size=SIDE),
        llm=None,
    )
    step = TrainStep(
        ModelDef(lambda: Gella(config, rngs=nnx.Rngs(0)), frozen=r"image_encoder"),
        GroundingTask(GellaLossConfig(reconstruction=LossConfig(num_points=512, shared_points=True)), QUERIES),
        optim=OptimConfig(learning_rate=3e-3, clip_norm=1.0, warmup_steps=10, weight_decay=0.0),
        total_steps=STEPS,
        mesh=make_mesh(1, 1, 1, devices=jax.devices()[:1]),
    )
    state, batch = step.init(), make_batch()
    for _ in range(STEPS):
        state, _ = step(state, batch)

    @jax.jit
    def predict(key):
        model = step.model.merge(state.params, state.constants)
        vision = model.vision_tokens(batch["image"], batch["image_size"])
        output = model.entities(vision, jnp.asarray(batch["label_map"]), jax.random.split(key, 4))
        logits = output.masks.image_mask_logits()[:, 0]
        return resize_bilinear(logits, (SIDE, SIDE), axes=(2, 3)), output.embed

    return lambda seed: jax.device_get(predict(jax.random.key(seed)))


def best_overlaps(logits):
    """Per painted entity: its number, and the IoU of its best query."""
    out = []
    for masks, labels in zip(logits > 0, make_batch()["label_map"], strict=True):
        for entity in np.unique(labels)[1:]:
            truth = labels == entity
            overlap = (masks & truth).sum((1, 2)) / (masks | truth).sum((1, 2))
            out.append((entity, overlap.max()))
    return np.array(out)


@pytest.fixture(scope="module")
def with_skip():
    return overfit("paper_skip")


def test_detail_comes_back_with_the_skip_and_not_without(with_skip):
    """Stripes as fine as the mask features are what the literal wiring's grid of image tokens cannot carry."""
    kept, literal = (best_overlaps(predict(0)[0]) for predict in (with_skip, overfit("paper")))
    stripes = kept[:, 0] <= 2
    print(f"mean IoU: paper_skip {kept[:, 1].mean():.3f}, paper {literal[:, 1].mean():.3f}")
    print(f"of stripes: paper_skip {kept[stripes, 1].mean():.3f}, paper {literal[stripes, 1].mean():.3f}")
    assert kept[:, 1].mean() > 0.95
    assert literal[stripes, 1].mean() < kept[stripes, 1].mean() - 0.1


def test_other_colours_change_the_queries_not_the_entities(with_skip):
    first, second = (best_overlaps(with_skip(seed)[0]) for seed in (1, 2))
    assert first[:, 1].mean() > 0.95 and second[:, 1].mean() > 0.95
