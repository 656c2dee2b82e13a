"""The full-size Swin-T Mask2Former against transformers': depth is where small errors would add up."""

import numpy as np
import pytest
from flax import nnx

from esg_jax.interop.checkpoints import save_checkpoint
from esg_jax.interop.convert import load_into, targets_of
from esg_jax.models.cropformer import CropFormer, CropFormerConfig

pytestmark = [pytest.mark.torch, pytest.mark.slow]


def test_swin_tiny(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from esg_jax.interop.families.mask2former import verify

    config = CropFormerConfig.swin_tiny().without_views()
    model = nnx.eval_shape(lambda: CropFormer(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    arrays = {}
    for name, x in targets_of(model).items():
        value = rng.normal(size=x.shape) / np.sqrt(max(1, np.prod(x.shape[:-1])))
        if name.startswith("mask_decoder.mask_head.layers.2"):
            value *= 0.1  # mask logits of order 10, as trained models have
        arrays[name] = (1 + 0.2 * np.tanh(value) if name.endswith("scale") else value).astype(np.float32)
    model = load_into(model, arrays)
    save_checkpoint(tmp_path / "out", model, "transformers")
    # The smallest image on which every stage holds a whole window.
    for item in verify(tmp_path / "out", model, (224, 256)):
        assert item.absolute < 1e-4, item
