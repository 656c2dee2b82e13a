"""Keys in the padding of an image: masked out for those who ask, and only then."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from esg_jax.models.cropformer.mask_decoder import MaskDecoder, MaskDecoderConfig, Memory, image_memory
from esg_jax.models.gella.entity_encoder import EntityEncoder

CONFIG = MaskDecoderConfig(hidden_dim=16, mask_dim=8, num_heads=2, ffn_dim=16, num_layers=2, num_queries=3)
CELLS, CONTENT = 12, 7


@pytest.fixture(scope="module")
def decode():
    decoder = MaskDecoder(CONFIG, num_levels=1, rngs=nnx.Rngs(0))
    return nnx.jit(lambda memory: decoder(decoder.queries(1), [memory])[1])


@pytest.fixture(scope="module")
def memory():
    """Mask features for which some queries see nothing of the content, so that their rows are opened."""
    rng = np.random.default_rng(0)
    tokens, features = (rng.normal(size=(1, CELLS, c)).astype(np.float32) for c in (16, 8))
    features[:, 1:CONTENT] = features[:, :1]
    position = rng.normal(size=(CELLS, 16)).astype(np.float32)
    return Memory(tokens, position, features)


def test_padded_keys_do_not_exist(decode, memory):
    padding = (np.arange(CELLS) >= CONTENT)[None]
    content = Memory(memory.tokens[:, :CONTENT], memory.position[:CONTENT], memory.mask_features[:, :CONTENT])
    masked = decode(dataclasses.replace(memory, padding=padding))
    np.testing.assert_allclose(masked, decode(content), atol=1e-5)
    assert np.abs(masked - decode(memory)).max() > 1e-2, "without the mask the padding is seen"
    nothing = dataclasses.replace(memory, padding=np.zeros((1, CELLS), bool))
    np.testing.assert_array_equal(decode(nothing), decode(memory))


def test_cells_with_any_content_are_keys():
    maps = [np.zeros((1, side, side, 16), np.float32) for side in (1, 2, 4)]
    valid = np.zeros((1, 32, 32), bool)
    valid[:, :17, :8] = True
    levels = image_memory(np.zeros((1, 8, 8, 8), np.float32), maps, valid)
    assert [(~level.padding).sum() for level in levels] == [1, 2, 3]
    assert all(level.padding is None for level in image_memory(np.zeros((1, 8, 8, 8), np.float32), maps))


def test_the_switch_of_the_entity_encoder(tiny_gella_config):
    config = dataclasses.replace(tiny_gella_config.entities, key_padding=True)
    model = nnx.eval_shape(lambda: EntityEncoder(config, 64, rngs=nnx.Rngs(0)))
    image, colormap = (jax.ShapeDtypeStruct((1, side, side, c), np.float32) for side, c in ((2, 64), (64, 3)))
    with pytest.raises(ValueError, match="valid_bhw"):
        nnx.eval_shape(lambda m, x, y: m(x, y), model, image, colormap)
    valid = jax.ShapeDtypeStruct((1, 64, 64), bool)
    out = nnx.eval_shape(lambda m, x, y, v: m(x, y, valid_bhw=v), model, image, colormap, valid)
    assert out.embed.shape == (1, 8, 32)
