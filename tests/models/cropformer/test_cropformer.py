"""CropFormer and Mask2Former against the reference implementation, sub-layer by sub-layer, in float32."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esg_jax.config import from_dict, to_dict
from esg_jax.models.cropformer import CropFormer, CropFormerConfig
from esg_jax.models.cropformer.mask_decoder import MaskDecoderConfig, Memory
from esg_jax.models.cropformer.pixel_decoder import PixelDecoderConfig
from esg_jax.models.positions import sine_position, view_sine_position
from esg_jax.ops.resize import resize_bilinear

SIMPLE, DEEP = 1e-5, 1e-4


@pytest.fixture(scope="module")
def golden(shared):
    return np.load(shared("fixtures", "cropformer", "infer_dev.npz"))


@pytest.fixture(scope="module")
def model(golden, reference_model):
    return reference_model(golden)


def nhwc(x):
    return np.moveaxis(x, 1, -1)


def nqc(x):
    """The reference keeps (queries, items, channels)."""
    return x.transpose(1, 0, 2)


def assert_close(actual, expected, tolerance=DEEP):
    np.testing.assert_allclose(np.asarray(actual), expected, atol=tolerance, rtol=tolerance)


@pytest.fixture(scope="module")
def views(golden):
    """Input views padded to the common size, and their sizes before padding."""
    sizes = golden["mid/inference/image_sizes"].astype(np.int32)
    height, width = golden["mid/backbone/input_normalized_padded"].shape[2:]
    image = np.zeros((1, 5, height, width, 3), np.float32)
    for index, view in enumerate([golden["input/image"], *golden["input/image_crop"]]):
        image[0, index, : view.shape[1], : view.shape[2]] = view.transpose(1, 2, 0)
    return image, sizes[None]


@pytest.fixture(scope="module")
def output(model, views):
    return nnx.jit(lambda model, image, size: model(image, size))(model, *views)


def test_normalisation_zeroes_the_padding(model, golden, views):
    image, sizes = views
    image = np.where(image == 0, 255.0, image)  # whatever the padding holds
    expected = nhwc(golden["mid/backbone/input_normalized_padded"])
    actual = model.normalize(jnp.asarray(views[0]), jnp.asarray(sizes))
    assert_close(actual[0], expected, SIMPLE)
    padding = np.ones(image.shape[1:4], bool)
    for index, (height, width) in enumerate(sizes[0]):
        padding[index, :height, :width] = False
    assert np.all(np.asarray(model.normalize(jnp.asarray(image), jnp.asarray(sizes)))[0][padding] == 0)


def test_backbone(model, golden):
    features = model.backbone(jnp.asarray(nhwc(golden["mid/backbone/input_normalized_padded"])))
    for name, feature in zip(("res2", "res3", "res4", "res5"), features, strict=True):
        assert_close(feature, nhwc(golden[f"mid/backbone/{name}"]))


def test_pixel_decoder(model, golden):
    features = tuple(jnp.asarray(nhwc(golden[f"mid/backbone/{name}"])) for name in ("res2", "res3", "res4", "res5"))
    mask_features, memory = model.pixel_decoder(features)
    assert_close(mask_features, nhwc(golden["mid/pixel_decoder/mask_features"]))
    for level, tokens in enumerate(memory):
        assert_close(tokens, nhwc(golden[f"mid/pixel_decoder/multi_scale_{level}"]))


def decoder_memory(golden, level, joint):
    maps = nhwc(golden[f"mid/pixel_decoder/multi_scale_{level}"])
    features = resize_bilinear(jnp.asarray(nhwc(golden["mid/pixel_decoder/mask_features"])), maps.shape[1:3])
    views, height, width, channels = maps.shape
    items = 1 if joint else views
    position = view_sine_position(views, height, width, channels) if joint else sine_position(height, width, channels)
    return Memory(
        tokens=jnp.asarray(maps.reshape(items, -1, channels)),
        position=position.reshape(-1, channels),
        mask_features=features.reshape(items, -1, channels),
    )


@pytest.mark.parametrize("level_name", ["image", "batch"])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_decoder_layers_with_forced_inputs(model, golden, level_name, index):
    """Each sub-layer gets the reference's input and attention mask, so that no error travels."""
    joint = level_name == "batch"
    decoder, layer = model.mask_decoder, model.mask_decoder.layers[index]
    prefix = f"mid/decoder_{level_name}/layer{index}"
    items = 1 if joint else 5
    if index:
        state = jnp.asarray(nqc(golden[f"mid/decoder_{level_name}/layer{index - 1}/ffn"]))
    else:
        state = jnp.asarray(nqc(golden["mid/association/output"])) if joint else decoder.queries(items)
    memory = decoder_memory(golden, index, joint)

    blocked = golden[f"mid/attn_mask/{level_name}_{index}"].astype(bool)
    mask_embed = decoder.predict(state)[1]
    logits = jnp.einsum("nqc,nsc->nqs", mask_embed, memory.mask_features)
    np.testing.assert_array_equal(np.asarray(logits) < 0, blocked)

    blocked &= ~blocked.all(-1, keepdims=True)
    query_embed = decoder.query_embed[...]
    value = memory.tokens + decoder.level_embed[index]
    cross = layer.cross(state, query_embed, value + memory.position, value, jnp.asarray(blocked))
    assert_close(cross, nqc(golden[f"{prefix}/cross"]))
    attended = layer.self_attention(jnp.asarray(nqc(golden[f"{prefix}/cross"])), query_embed)
    assert_close(attended, nqc(golden[f"{prefix}/self"]))
    assert_close(layer.ffn(jnp.asarray(nqc(golden[f"{prefix}/self"]))), nqc(golden[f"{prefix}/ffn"]))
    whole = layer(state, query_embed, memory, decoder.level_embed[index], mask_embed)
    assert_close(whole, nqc(golden[f"{prefix}/ffn"]))


def test_association(model, golden):
    states = jnp.asarray(nqc(golden["mid/decoder_image/layer2/ffn"]))[None]
    actual = model.association(states, model.mask_decoder.query_embed[...])
    assert_close(actual, nqc(golden["mid/association/output"]))


def test_predictions_of_both_levels(output, golden):
    for index, name in enumerate(["aux0/", "aux1/", "aux2/", ""]):
        assert_close(output.image.logits[index], golden[f"out/image/{name}pred_logits"])
        assert_close(output.image_mask_logits(index)[0], golden[f"out/image/{name}pred_masks"])
        assert_close(output.batch.logits[index], golden[f"out/batch/{name}pred_logits"])
        assert_close(output.batch_mask_logits(index), golden[f"out/batch/{name}pred_masks"])


def test_final_prediction_alone_equals_the_last_of_all(model, views, output):
    final = nnx.jit(lambda model, image, size: model(image, size, all_predictions=False))(model, *views)
    assert final.batch.logits.shape[0] == 1
    assert_close(final.batch.logits[0], np.asarray(output.batch.logits[-1]), SIMPLE)


def test_mask2former_is_the_same_code_without_views(model, golden, views):
    image, size = views[0][:, :1], views[1][:, :1]
    plain = CropFormer(model.config.without_views(), rngs=nnx.Rngs(0))
    state = nnx.state(model)
    del state["association"]
    nnx.update(plain, state)
    result = nnx.jit(lambda model, image, size: model(image, size))(plain, image, size)
    assert result.batch is None
    assert_close(result.image.logits[-1], golden["out/mask2former/pred_logits"])
    assert_close(result.image_mask_logits()[0], golden["out/mask2former/pred_masks"])
    with pytest.raises(ValueError, match="no association module"):
        result.batch_mask_logits()


def test_remat_changes_nothing(model, views, output):
    graph, state = nnx.split(model)
    again = nnx.merge(
        nnx.graphdef(nnx.eval_shape(lambda: CropFormer(model.config, rngs=nnx.Rngs(0), remat=True))), state
    )
    result = nnx.jit(lambda model, image, size: model(image, size))(again, *views)
    assert_close(result.batch.logits, np.asarray(output.batch.logits), SIMPLE)


@pytest.mark.parametrize("name", ["swin_tiny", "swin_large", "resnet50"])
def test_parameter_counts_of_the_paper(name):
    config = getattr(CropFormerConfig, name)()
    state = nnx.state(nnx.eval_shape(lambda: CropFormer(config, rngs=nnx.Rngs(0))), nnx.Param)
    millions = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(state)) / 1e6
    # R50: Mask2Former's 43.95 plus the association's 1.58; its frozen statistics are no parameters.
    expected = {"swin_tiny": 48.98, "swin_large": 216.83, "resnet50": 43.95 + 1.58}[name]
    assert millions == pytest.approx(expected, abs=0.06 if name == "resnet50" else 0.006)


def test_config_survives_json():
    config = CropFormerConfig.mobilenet_v2()
    assert from_dict(CropFormerConfig, json.loads(json.dumps(to_dict(config)))) == config
    assert from_dict(CropFormerConfig, to_dict(config.without_views(133, 200))).mask_decoder.num_classes == 133


def test_bad_configs_are_refused():
    config = CropFormerConfig.mobilenet_v2()
    with pytest.raises(ValueError, match="conv_dim.*hidden_dim"):
        dataclasses.replace(config, mask_decoder=MaskDecoderConfig())
    with pytest.raises(ValueError, match="multiple of 32"):
        PixelDecoderConfig(conv_dim=100)
    with pytest.raises(ValueError, match="unknown key model.mask_decoder.num_querys"):
        from_dict(CropFormerConfig, {**to_dict(config), "mask_decoder": {"num_querys": 3}}, "model")


def test_sides_must_be_multiples_of_32(model):
    with pytest.raises(ValueError, match="multiples of 32"):
        model(jnp.zeros((1, 1, 33, 64, 3)), jnp.array([[[33, 64]]]))
