"""Backbones of torchvision and timm with random weights, through our tables, against their own forward passes."""

import jax
import numpy as np
import pytest
from flax import nnx

from esg_jax.interop.convert import load_into, targets_of, to_ours
from esg_jax.interop.families import detect
from esg_jax.models.backbones.mobilenet_v2 import MobileNetV2, MobileNetV2Config
from esg_jax.models.backbones.resnet import ResNet, ResNetConfig
from esg_jax.models.backbones.swin import Swin, SwinConfig

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

# No side is a multiple of a window at any stage but each is longer, where the implementations agree.
IMAGE = np.random.default_rng(0).normal(size=(1, 160, 224, 3)).astype(np.float32)
SWIN = SwinConfig(embed_dim=8, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 4), window_size=4)


@torch.no_grad()
def randomize(module):
    """Every parameter and statistic of order one, so that none is negligible."""
    torch.manual_seed(0)
    for name, x in (*module.named_parameters(), *module.named_buffers()):
        if name.endswith("running_var"):
            x.uniform_(0.5, 2)
        elif "attn_mask" in name or not x.is_floating_point():
            continue
        elif x.ndim < 2:
            x.add_(0.2 * torch.randn_like(x))
        elif "bias_table" in name:
            x.normal_()
        else:
            x.normal_(std=x[0].numel() ** -0.5)
    return module.eval()


def our_maps(cls, config, module, format_name):
    state = {name: x.numpy() for name, x in module.state_dict().items()}
    _, found = detect(state)
    assert found.name == format_name
    model = nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0)))
    arrays, _ = to_ours(state, targets_of(model), found.table, allow_missing=found.absent)
    for name, x in targets_of(model).items():  # norms of the outputs, which classifiers lack
        if name not in arrays:
            arrays[name] = np.full(x.shape, float(name.endswith("scale")), np.float32)
    return jax.jit(cls.__call__)(load_into(model, arrays), IMAGE)


def assert_maps(ours, theirs, normed):
    for a, b in zip(ours, theirs, strict=True):
        b = torch.nn.functional.layer_norm(b, b.shape[-1:]) if normed else b
        np.testing.assert_allclose(a, b.numpy(), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def nhwc_maps(stages, keep, channels_first):
    maps, x = [], torch.from_numpy(IMAGE.transpose(0, 3, 1, 2).copy())
    for index, stage in enumerate(stages):
        x = stage(x)
        if index in keep:
            maps.append(x.permute(0, 2, 3, 1) if channels_first else x)
    return maps


def test_swin_of_torchvision():
    models = pytest.importorskip("torchvision.models.swin_transformer")
    module = randomize(
        models.SwinTransformer(
            [4, 4], SWIN.embed_dim, list(SWIN.depths), list(SWIN.num_heads), [SWIN.window_size] * 2, num_classes=3
        )
    )
    theirs = nhwc_maps(module.features, (1, 3, 5, 7), channels_first=False)
    assert_maps(our_maps(Swin, SWIN, module, "Swin of torchvision"), theirs, normed=True)


def test_swin_of_timm():
    models = pytest.importorskip("timm.models.swin_transformer")
    module = randomize(
        models.SwinTransformer(
            img_size=IMAGE.shape[1:3],
            embed_dim=SWIN.embed_dim,
            depths=SWIN.depths,
            num_heads=SWIN.num_heads,
            window_size=SWIN.window_size,
            num_classes=3,
        )
    )
    theirs = nhwc_maps([module.patch_embed, *module.layers], (1, 2, 3, 4), channels_first=False)
    assert_maps(our_maps(Swin, SWIN, module, "Swin of timm"), theirs, normed=True)


def test_resnet_of_torchvision():
    models = pytest.importorskip("torchvision.models.resnet")
    module = randomize(models.ResNet(models.Bottleneck, [1, 2, 1, 1], num_classes=3))
    stem = torch.nn.Sequential(module.conv1, module.bn1, module.relu, module.maxpool)
    theirs = nhwc_maps(
        [stem, module.layer1, module.layer2, module.layer3, module.layer4], (1, 2, 3, 4), channels_first=True
    )
    config = ResNetConfig(depths=(1, 2, 1, 1))
    assert_maps(our_maps(ResNet, config, module, "ResNet of torchvision"), theirs, normed=False)


def test_mobilenet_of_torchvision():
    models = pytest.importorskip("torchvision.models.mobilenetv2")
    module = randomize(models.MobileNetV2(num_classes=3))
    theirs = nhwc_maps(module.features, (3, 6, 13, 17), channels_first=True)
    ours = our_maps(MobileNetV2, MobileNetV2Config(), module, "MobileNetV2 of torchvision")
    assert_maps(ours, theirs, normed=False)
