"""The PyTorch CropFormer that runs our exports, against golden outputs and against our other formats."""

import numpy as np
import pytest
from flax import nnx

from esg_jax.config import to_dict
from esg_jax.interop.checkpoints import config_of, save_checkpoint
from esg_jax.interop.convert import load_into, targets_of
from esg_jax.interop.families import detect
from esg_jax.interop.readers import reader_of
from esg_jax.models.backbones.mobilenet_v2 import MobileNetV2, MobileNetV2Config
from esg_jax.models.backbones.resnet import ResNet, ResNetConfig
from esg_jax.models.cropformer import CropFormer, CropFormerConfig
from esg_jax.models.cropformer.mask_decoder import MaskDecoderConfig
from esg_jax.models.cropformer.pixel_decoder import PixelDecoderConfig

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch


def test_golden_outputs(shared):
    from esg_jax.interop.pytorch.cropformer import CropFormer as Reference

    golden = np.load(shared("fixtures", "cropformer", "infer_dev.npz"))
    state = {name.removeprefix("param/"): golden[name] for name in golden.files if name.startswith("param/")}
    reader = reader_of(state)
    model = Reference(to_dict(config_of(reader, *detect(reader)))).eval()
    model.load_state_dict({name: torch.from_numpy(x) for name, x in state.items()}, strict=True)
    sizes = golden["mid/inference/image_sizes"].astype(np.int64)
    height, width = golden["mid/backbone/input_normalized_padded"].shape[2:]
    image = np.full((1, 5, 3, height, width), 255, np.float32)  # whatever the padding holds
    for index, view in enumerate([golden["input/image"], *golden["input/image_crop"]]):
        image[0, index, :, : view.shape[1], : view.shape[2]] = view
    with torch.inference_mode():
        logits, masks = model(torch.from_numpy(image), torch.from_numpy(sizes)[None])
    np.testing.assert_allclose(logits, golden["out/batch/pred_logits"], atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(masks, golden["out/batch/pred_masks"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("cls", "config"),
    [(ResNet, ResNetConfig((1, 2, 1, 1), stem_channels=8, bottleneck_channels=8)), (MobileNetV2, MobileNetV2Config())],
    ids=["resnet", "mobilenet"],
)
def test_other_backbones_load_and_agree(cls, config, tmp_path):
    """The file that we write loads strictly, and its backbone computes the same maps."""
    from esg_jax.interop.pytorch.cropformer import load

    whole = CropFormerConfig(
        backbone=config,
        pixel_decoder=PixelDecoderConfig(conv_dim=32, mask_dim=32, num_layers=1, num_heads=4, ffn_dim=16),
        mask_decoder=MaskDecoderConfig(
            hidden_dim=32, mask_dim=32, num_heads=4, ffn_dim=16, num_layers=1, num_queries=5, num_classes=3
        ),
        association=None,
    )
    model = nnx.eval_shape(lambda: CropFormer(whole, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    arrays = {}
    for name, x in targets_of(model).items():
        value = rng.normal(size=x.shape) / np.sqrt(max(1, np.prod(x.shape[:-1])))
        arrays[name] = (1 + 0.2 * np.tanh(value) if name.endswith(("scale", "var")) else value).astype(np.float32)
    model = load_into(model, arrays)
    save_checkpoint(tmp_path / "model.pth", model)
    reference = load(tmp_path / "model.pth")
    x = rng.normal(size=(1, 64, 96, 3)).astype(np.float32)
    ours = nnx.jit(lambda backbone, x: backbone(x))(model.backbone, x)
    with torch.inference_mode():
        theirs = reference.backbone(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b.numpy().transpose(0, 2, 3, 1), atol=1e-4, rtol=1e-4)
