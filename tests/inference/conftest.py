import copy
import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esg_jax.inference.grounding.decisions import GroundingConfig
from esg_jax.inference.grounding.grounder import Grounder
from esg_jax.inference.masks_in import disjoint_masks
from esg_jax.input.mask_files import read_masks
from esg_jax.models.backbones.swin import SwinConfig
from esg_jax.models.cropformer import CropFormer, CropFormerConfig
from esg_jax.models.gella import Gella
from esg_jax.models.mask_decoder import MaskDecoderConfig
from esg_jax.models.pixel_decoder import PixelDecoderConfig
from esg_jax.models.view_association import AssociationConfig
from esg_jax.text.prompts import Prompts
from esg_jax.weights import save_weights

TINY = CropFormerConfig(
    backbone=SwinConfig(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=4),
    pixel_decoder=PixelDecoderConfig(conv_dim=32, mask_dim=32, num_layers=1, num_heads=8, ffn_dim=32),
    mask_decoder=MaskDecoderConfig(hidden_dim=32, mask_dim=32, num_heads=8, ffn_dim=32, num_layers=1, num_queries=7),
    association=AssociationConfig(num_heads=8, ffn_dim=32),
)


def build(config, model=CropFormer):
    """A model with random weights, large enough for masks that vary over the image; nothing is compiled for it."""
    rng = np.random.default_rng(0)
    graph, state = nnx.split(nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0))))
    flat = dict(nnx.to_flat_state(state))
    for path, variable in flat.items():
        shape = variable.get_value().shape
        values = rng.normal(0, 1.5 / np.sqrt(shape[0]) if len(shape) > 1 else 0.1, shape) + (path[-1] == "scale")
        flat[path] = variable.replace(jnp.asarray(values, jnp.float32))
    return nnx.merge(graph, nnx.from_flat_state(flat))


@pytest.fixture(scope="session")
def random_model():
    """`random_model(config, module)`."""
    return build


@pytest.fixture(scope="session")
def tiny_model():
    """A CropFormer with seven queries."""
    return build(TINY)


@pytest.fixture(scope="session")
def tiny_class_model():
    """A plain Mask2Former with three classes."""
    return build(TINY.without_views(num_classes=3))


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_model, tmp_path_factory):
    """The CropFormer as a file that asks for small views."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(path, tiny_model, {"inference": {"min_size": 64, "max_size": 96}})
    return path


class WordTokenizer:
    """A fixed id per word or sign; unknown words share ids, so decoding gives some word of that id."""

    bos_id, eos_id, pad_id, image_id, seg_id, vocab_size = 1, 2, 61, 60, 62, 63

    def __init__(self):
        self.words = {}

    def encode(self, text):
        ids = []
        for word in re.findall(r" ?\w+|.", text):
            token = 3 + sum(word.encode()) % 56
            self.words.setdefault(token, word)
            ids.append(token)
        return ids

    def decode(self, ids):
        return "".join(self.words.get(int(token), " ?") for token in ids)


@pytest.fixture(scope="session")
def word_tokenizer():
    """For the tiny GELLA."""
    return WordTokenizer()


@pytest.fixture(scope="session")
def short_prompts(tmp_path_factory):
    """Wording that fits into 128 tokens."""
    file = tmp_path_factory.mktemp("prompts") / "short.yaml"
    file.write_text(
        "conversations: {vicuna: {system: ''}}\nquestions: {extraction: ['Nouns: {text}'], description: ['Tell me']}\n"
    )
    return Prompts.load(file)


@pytest.fixture(scope="session")
def tiny_gella(tiny_gella_config):
    """A GELLA with random weights; Swin is its colormap encoder, which compiles fastest."""
    entities = dataclasses.replace(tiny_gella_config.entities, colormap_encoder=TINY.backbone)
    return build(dataclasses.replace(tiny_gella_config, entities=entities), Gella)


@pytest.fixture(scope="session")
def reconstructing_grounder(tiny_gella, short_prompts, word_tokenizer):
    """Two images at a time, two colourings, the model's own masks."""
    # Random weights reconstruct nothing, so every match counts.
    config = GroundingConfig(match_iou=0.0, output_masks="reconstructed", colorings=2)
    return Grounder(tiny_gella, word_tokenizer, short_prompts, config, batch_size=2, max_new_tokens=6)


@pytest.fixture(scope="session")
def grounder(reconstructing_grounder):
    """The same compiled programs with the given masks as output."""
    other = copy.copy(reconstructing_grounder)
    other.config = dataclasses.replace(other.config, output_masks="input")
    return other


@pytest.fixture(scope="session")
def pictures():
    """Three images of different shapes with three entities each."""
    rng = np.random.default_rng(0)
    images, masks = [], []
    for height, width in ((40, 60), (60, 40), (30, 30)):
        images.append(rng.integers(0, 256, (height, width, 3), np.uint8))
        labels = np.zeros((height, width), np.int32)
        labels[: height // 2], labels[height // 2 :, : width // 2], labels[height // 2 :, width // 2 + 3 :] = 5, 9, 2
        masks.append(disjoint_masks(read_masks(labels, (height, width))))
    return images, masks
