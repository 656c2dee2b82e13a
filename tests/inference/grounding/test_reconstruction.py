"""Reconstruction on the command line: masks find back to the image's own geometry."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from esg_jax.inference.grounding.reconstruction import Reconstructor
from esg_jax.input.records import Entities
from esg_jax.masks import MaskSet
from esg_jax.models.gella import Gella
from esg_jax.ops.padding import PAD_POSITIONS

HEIGHT, WIDTH = 90, 130


@pytest.fixture(scope="module")
def reconstruct(tiny_gella_config):
    return Reconstructor(Gella(tiny_gella_config, rngs=nnx.Rngs(0)))


@pytest.fixture
def entities():
    labels = np.zeros((HEIGHT, WIDTH), np.int32)
    labels[10:50, 20:70] = 1
    labels[60:88, 80:128] = 2
    return Entities.unlabelled(MaskSet([labels], (1, 2)))


def test_all_queries_at_the_resolution_of_the_image(reconstruct, entities, tiny_gella_config):
    masks, scores = reconstruct(np.zeros((HEIGHT, WIDTH, 3), np.uint8), entities)
    assert masks.shape == (tiny_gella_config.num_queries, HEIGHT, WIDTH) and masks.dtype == bool
    assert ((scores >= 0) & (scores <= 1)).all()


@pytest.mark.parametrize("pad_position", PAD_POSITIONS)
def test_geometry(reconstruct, entities, monkeypatch, pad_position):
    """A network that gives back what is painted, at stride 4, gives back the masks."""

    def painted(image, size, label_map, map_size):
        cells = label_map.reshape(-1, 16, 4, 16, 4)
        logits = np.stack([(cells == k).mean((2, 4)) - 0.5 for k in (1, 2)], axis=1).astype(np.float32)
        return np.ones((len(cells), 2)), logits

    monkeypatch.setattr(reconstruct, "_run", painted)
    monkeypatch.setattr(reconstruct, "config", dataclasses.replace(reconstruct.config, pad_position=pad_position))
    masks, _ = reconstruct(np.zeros((HEIGHT, WIDTH, 3), np.uint8), entities)
    for index, mask in enumerate(masks):
        truth = entities.mask(index)
        assert (mask & truth).sum() / (mask | truth).sum() > 0.85
