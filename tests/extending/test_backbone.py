"""A backbone that lives outside the package: one module, one entry for models, one for checkpoints."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import esg_jax
from esg_jax.config import from_dict, to_dict
from esg_jax.interop.checkpoints import load_part, save_checkpoint
from esg_jax.interop.convert import ConversionError, from_ours, targets_of
from esg_jax.interop.families import backbones as checkpoints
from esg_jax.interop.families.family import BackboneFamily, Format, Inside
from esg_jax.interop.readers import open_checkpoint
from esg_jax.interop.rules import Table, linear
from esg_jax.interop.writers import write_pth
from esg_jax.models.backbones import BACKBONES, make_backbone
from esg_jax.models.backbones.swin import SwinConfig
from esg_jax.models.cropformer import CropFormer, CropFormerConfig
from esg_jax.models.cropformer.mask_decoder import MaskDecoderConfig
from esg_jax.models.cropformer.pixel_decoder import PixelDecoderConfig
from esg_jax.models.gella import Gella, GellaConfig
from esg_jax.weights import save_weights


# What its author writes: the module,
@dataclasses.dataclass(frozen=True)
class PatchesConfig:
    """Means of square patches; `width` channels at stride 4, doubled from stage to stage."""

    width: int = 8


class Patches(nnx.Module):
    def __init__(self, config, *, rngs, dtype=jnp.float32, param_dtype=jnp.float32, remat=False):
        self.out_channels = [config.width * 2**stage for stage in range(4)]
        self.stages = nnx.List(
            [nnx.Linear(3, width, rngs=rngs, dtype=dtype, param_dtype=param_dtype) for width in self.out_channels]
        )

    def __call__(self, image, *, drop_path_key=None):
        maps = []
        for stride, stage in zip((4, 8, 16, 32), self.stages, strict=True):
            batch, height, width, _ = image.shape
            patches = image.reshape(batch, height // stride, stride, width // stride, stride, 3)
            maps.append(stage(patches.mean((2, 4))))
        return maps


# and its checkpoints.
TABLE = Table(rules=linear("proj.{s}", "stages.{s}"))
FAMILY = BackboneFamily(
    model=Patches,
    config=PatchesConfig,
    formats=lambda: (Format("patches", (r"^proj\.0\.weight", r"^proj\.3\.weight"), TABLE),),
    infer=lambda shapes, num_heads: PatchesConfig(shapes["stages.0.kernel"][1]),
    reference=Inside(r"proj\.0", TABLE),
)
CONFIG = CropFormerConfig(
    PatchesConfig(4),
    PixelDecoderConfig(conv_dim=32, mask_dim=32, num_layers=1, num_heads=8, ffn_dim=16),
    MaskDecoderConfig(hidden_dim=32, mask_dim=32, num_heads=8, ffn_dim=16, num_layers=1, num_queries=5),
    association=None,
)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(BACKBONES, PatchesConfig, Patches)
    checkpoints.BACKBONES.append(FAMILY)
    yield
    checkpoints.BACKBONES.remove(FAMILY)


@pytest.fixture
def model(registered):
    return CropFormer(CONFIG, rngs=nnx.Rngs(0))


def test_models_and_configurations_take_it(model, tiny_gella_config, tmp_path):
    assert from_dict(CropFormerConfig, to_dict(CONFIG)) == CONFIG
    image, size = np.zeros((1, 1, 64, 96, 3), np.uint8), np.array([[[64, 96]]], np.int32)
    masks = jax.eval_shape(lambda: model(image, size).image_mask_logits())
    assert masks.shape == (1, 1, 5, 16, 24)
    save_weights(tmp_path / "weights.safetensors", model)
    again = esg_jax.load(tmp_path / "weights.safetensors")
    assert again.config == CONFIG
    np.testing.assert_array_equal(again.backbone.stages[3].kernel, model.backbone.stages[3].kernel)

    encoder = dataclasses.replace(tiny_gella_config.entities, colormap_encoder=PatchesConfig())
    config = dataclasses.replace(tiny_gella_config, entities=encoder, vision=PatchesConfig(), image_size=64, lora=None)
    assert from_dict(GellaConfig, to_dict(config)) == config
    gella = nnx.eval_shape(lambda: Gella(config, rngs=nnx.Rngs(0)))
    assert type(gella.visual.image_encoder) is type(gella.visual.entity_encoder.colormap_encoder) is Patches
    assert gella.visual.image_channels == 64 and config.grid == 2
    save_checkpoint(tmp_path / "gella", filled(gella))
    names = set(open_checkpoint(tmp_path / "gella" / "gella.safetensors"))
    assert {"image_encoder.proj.3.weight", "colormap_encoder.proj.3.weight"} <= names
    assert esg_jax.load(tmp_path / "gella").config == config


def filled(model):
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state))


def test_checkpoints_with_it_convert_both_ways(model, tmp_path):
    save_checkpoint(tmp_path / "model.pth", model)
    theirs = dict(open_checkpoint(tmp_path / "model.pth"))
    assert theirs["backbone.proj.0.weight"].shape == (4, 3)
    write_pth(tmp_path / "bare.pth", theirs.items(), {})  # without our configuration: sizes come from shapes
    for name in ("model.pth", "bare.pth"):
        again = esg_jax.load(tmp_path / name)
        assert again.config == CONFIG
        for key, value in targets_of(model).items():
            np.testing.assert_array_equal(value, targets_of(again)[key], err_msg=key)
    write_pth(tmp_path / "patches.pth", from_ours(targets_of(model.backbone), TABLE).items(), {})
    empty = nnx.eval_shape(lambda: Patches(CONFIG.backbone, rngs=nnx.Rngs(0)))
    backbone, report = load_part(empty, tmp_path / "patches.pth")
    assert len(report.used) == 8
    np.testing.assert_array_equal(backbone.stages[1].kernel, model.backbone.stages[1].kernel)


def test_what_is_missing_is_named(model, tmp_path):
    with pytest.raises(ConversionError, match="transformers' Mask2Former has no Patches backbone"):
        save_checkpoint(tmp_path / "out", model, "transformers")
    checkpoints.BACKBONES.remove(FAMILY)
    with pytest.raises(ConversionError, match="no names for checkpoints with a PatchesConfig"):
        save_checkpoint(tmp_path / "model.pth", model)
    checkpoints.BACKBONES.append(FAMILY)
    assert not list(tmp_path.iterdir())


def test_an_unknown_backbone_is_refused_by_name(tiny_gella_config):
    with pytest.raises(ValueError, match="no backbone for a PatchesConfig; choose one of SwinConfig, "):
        make_backbone(PatchesConfig(), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"config\.backbone\.type is 'PatchesConfig'; choose one of .*SwinConfig"):
        from_dict(CropFormerConfig, {"backbone": {"type": "PatchesConfig"}})
    with pytest.raises(ValueError, match="vision is a PatchesConfig; choose"):
        dataclasses.replace(tiny_gella_config, vision=PatchesConfig())
    assert from_dict(CropFormerConfig, {"backbone": to_dict(SwinConfig.tiny())}).backbone == SwinConfig.tiny()
