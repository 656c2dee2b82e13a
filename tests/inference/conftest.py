import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esg_jax.models.backbones.swin import SwinConfig
from esg_jax.models.cropformer import CropFormer, CropFormerConfig
from esg_jax.models.mask_decoder import MaskDecoderConfig
from esg_jax.models.pixel_decoder import PixelDecoderConfig
from esg_jax.models.view_association import AssociationConfig
from esg_jax.weights import save_weights

TINY = CropFormerConfig(
    backbone=SwinConfig(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=4),
    pixel_decoder=PixelDecoderConfig(conv_dim=32, mask_dim=32, num_layers=1, num_heads=8, ffn_dim=32),
    mask_decoder=MaskDecoderConfig(hidden_dim=32, mask_dim=32, num_heads=8, ffn_dim=32, num_layers=1, num_queries=7),
    association=AssociationConfig(num_heads=8, ffn_dim=32),
)


def build(config):
    """A model with random weights, large enough for masks that vary over the image; nothing is compiled for it."""
    rng = np.random.default_rng(0)
    graph, state = nnx.split(nnx.eval_shape(lambda: CropFormer(config, rngs=nnx.Rngs(0))))
    flat = dict(nnx.to_flat_state(state))
    for path, variable in flat.items():
        shape = variable.get_value().shape
        values = rng.normal(0, 1.5 / np.sqrt(shape[0]) if len(shape) > 1 else 0.1, shape) + (path[-1] == "scale")
        flat[path] = variable.replace(jnp.asarray(values, jnp.float32))
    return nnx.merge(graph, nnx.from_flat_state(flat))


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
