"""Which parameters of the real models decay and learn slowly: the reference's rules on our names (spec 6.5)."""

import re

import pytest
from flax import nnx

from esg_jax.models.cropformer import CropFormer, CropFormerConfig
from esg_jax.sharding import DEFAULT_RULES, make_mesh, partition_specs
from esg_jax.train.optim import OptimConfig, decay_mask, learning_rate_multipliers
from esg_jax.train.state import ModelDef

# The reference decides by module type: LayerNorm and GroupNorm, nn.Embedding, and the name of the position table.
NO_DECAY = {
    "backbone.norms.#.bias",
    "backbone.norms.#.scale",
    "backbone.merges.#.norm.bias",
    "backbone.merges.#.norm.scale",
    "backbone.patch_norm.bias",
    "backbone.patch_norm.scale",
    "backbone.stages.#.#.attention.relative_position_bias_table",
    "backbone.stages.#.#.norm#.bias",
    "backbone.stages.#.#.norm#.scale",
    "pixel_decoder.input_proj.#.norm.bias",
    "pixel_decoder.input_proj.#.norm.scale",
    "pixel_decoder.lateral.norm.bias",
    "pixel_decoder.lateral.norm.scale",
    "pixel_decoder.output.norm.bias",
    "pixel_decoder.output.norm.scale",
    "pixel_decoder.layers.#.norm.bias",
    "pixel_decoder.layers.#.norm.scale",
    "pixel_decoder.layers.#.ffn.norm.bias",
    "pixel_decoder.layers.#.ffn.norm.scale",
    "mask_decoder.query_feat",
    "mask_decoder.query_embed",
    "mask_decoder.level_embed",
    "mask_decoder.norm.bias",
    "mask_decoder.norm.scale",
    *(
        f"{module}.layers.#.{layer}.norm.{kind}"
        for module in ("mask_decoder", "association")
        for layer in ("cross", "self_attention", "ffn")
        for kind in ("bias", "scale")
    ),
}


@pytest.fixture(scope="module", params=["tiny", "large"])
def swin(request):
    config = {"tiny": CropFormerConfig.swin_tiny, "large": CropFormerConfig.swin_large}[request.param]()
    return ModelDef(lambda: CropFormer(config, rngs=nnx.Rngs(0)))


def test_number_of_parameters_is_the_references(swin):
    millions = sum(value.size for value in swin.params.values()) / 1e6
    assert any(abs(millions - expected) < 0.006 for expected in (48.98, 216.83))


def test_no_decay_is_the_reference_set(swin):
    mask = decay_mask(swin.params, OptimConfig())
    assert {re.sub(r"\d+", "#", name) for name, decays in mask.items() if not decays} == NO_DECAY


def test_biases_and_the_pixel_decoders_level_embedding_decay(swin):
    mask = decay_mask(swin.params, OptimConfig())
    for name in (
        "backbone.patch_embed.bias",
        "backbone.stages.0.0.attention.qkv.bias",
        "backbone.stages.2.5.fc2.bias",
        "pixel_decoder.level_embed",
        "pixel_decoder.layers.0.attention.sampling_offsets.bias",
        "mask_decoder.class_head.bias",
        "mask_decoder.layers.0.cross.attention.query.bias",
        "association.layers.0.ffn.mlp.layers.0.bias",
    ):
        assert mask[name], name


def test_backbone_learns_ten_times_slower(swin):
    factors = learning_rate_multipliers(swin.params, OptimConfig())
    assert {factor for name, factor in factors.items() if name.startswith("backbone.")} == {0.1}
    assert {factor for name, factor in factors.items() if not name.startswith("backbone.")} == {1.0}


@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 4, 2), (2, 2, 2)])
def test_default_sharding_table_fits(swin, shape):
    mesh = make_mesh(*shape)
    specs = partition_specs(swin.params, DEFAULT_RULES, mesh)
    total = sum(value.size for value in swin.params.values())
    per_device = sum(value.size / _parts(specs[name], mesh) for name, value in swin.params.items())
    # Nearly everything is split; what stays whole is norms, biases and tables.
    assert per_device < 1.1 * total / mesh.shape["fsdp"]


def _parts(spec, mesh):
    parts = 1
    for axes in spec:
        for axis in () if axes is None else (axes,) if isinstance(axes, str) else axes:
            parts *= mesh.shape[axis]
    return parts
