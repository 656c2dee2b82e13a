"""ResNet under the names of detectron2, torchvision and transformers."""

from esg_jax.interop.families.family import BackboneFamily, Format, Inside, InTransformers, Json, Shapes, depths
from esg_jax.interop.rules import Rule, Table, batch_norm_counter, conv, frozen_batch_norm
from esg_jax.models.backbones.resnet import ResNet, ResNetConfig


def _conv_norm(theirs_conv: str, theirs_norm: str, ours: str) -> tuple[Rule, ...]:
    return (*conv(theirs_conv, f"{ours}.conv"), *frozen_batch_norm(theirs_norm, f"{ours}.norm"))


def _three(make) -> tuple:
    """`make(index from "0", index from "1")` for the convolutions of a bottleneck."""
    return tuple(item for index in range(3) for item in make(str(index), str(index + 1)))


_BLOCK = "stages.{s}.{b}"
DETECTRON2 = Table(
    rules=(
        *_conv_norm("stem.conv1", "stem.conv1.norm", "stem"),
        *_three(
            lambda _, n: _conv_norm("res{s+2}.{b}.conv" + n, "res{s+2}.{b}.conv" + n + ".norm", f"{_BLOCK}.conv{n}")
        ),
        *_conv_norm("res{s+2}.{b}.shortcut", "res{s+2}.{b}.shortcut.norm", f"{_BLOCK}.shortcut"),
    ),
    renames=((r"^bottom_up\.", ""),),
    # Files converted from torchvision keep the classifier and the counters.
    dropped=(r"linear\.(weight|bias)", r"stem\.fc\.(weight|bias)", r".*\.norm\.num_batches_tracked"),
)
TORCHVISION = Table(
    rules=(
        *_conv_norm("conv1", "bn1", "stem"),
        *_three(lambda _, n: _conv_norm("layer{s+1}.{b}.conv" + n, "layer{s+1}.{b}.bn" + n, f"{_BLOCK}.conv{n}")),
        *_conv_norm("layer{s+1}.{b}.downsample.0", "layer{s+1}.{b}.downsample.1", f"{_BLOCK}.shortcut"),
    ),
    buffers=(
        batch_norm_counter("bn1", "stem.norm"),
        *_three(lambda _, n: (batch_norm_counter("layer{s+1}.{b}.bn" + n, f"{_BLOCK}.conv{n}.norm"),)),
        batch_norm_counter("layer{s+1}.{b}.downsample.1", f"{_BLOCK}.shortcut.norm"),
    ),
    dropped=(r"fc\.(weight|bias)",),
)
_HF_STEM, _HF_STAGE = "embedder.embedder", "encoder.stages.{s}.layers.{b}"
HF = Table(
    rules=(
        *_conv_norm(f"{_HF_STEM}.convolution", f"{_HF_STEM}.normalization", "stem"),
        *_three(
            lambda i, n: _conv_norm(
                f"{_HF_STAGE}.layer.{i}.convolution", f"{_HF_STAGE}.layer.{i}.normalization", f"{_BLOCK}.conv{n}"
            )
        ),
        *_conv_norm(f"{_HF_STAGE}.shortcut.convolution", f"{_HF_STAGE}.shortcut.normalization", f"{_BLOCK}.shortcut"),
    ),
    buffers=(
        batch_norm_counter(f"{_HF_STEM}.normalization", "stem.norm"),
        *_three(lambda i, n: (batch_norm_counter(f"{_HF_STAGE}.layer.{i}.normalization", f"{_BLOCK}.conv{n}.norm"),)),
        batch_norm_counter(f"{_HF_STAGE}.shortcut.normalization", f"{_BLOCK}.shortcut.norm"),
    ),
    renames=((r"^resnet\.", ""),),
    dropped=(r"classifier\.1\.(weight|bias)",),
)


def infer(shapes: Shapes, num_heads: int | None = None) -> ResNetConfig:
    """Sizes from the shapes of a `ResNet`."""
    *_, stem, bottleneck = shapes["stages.0.0.conv1.conv.kernel"]
    return ResNetConfig(depths=depths(shapes), stem_channels=stem, bottleneck_channels=bottleneck)


def _write_json(config: ResNetConfig) -> Json:
    return {
        "depths": config.depths,
        "embedding_size": config.stem_channels,
        "hidden_sizes": [4 * config.bottleneck_channels * 2**stage for stage in range(4)],
        "layer_type": "bottleneck",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
    }


def _read_json(values: Json, where: str) -> ResNetConfig:
    if values.get("layer_type", "bottleneck") != "bottleneck":
        raise ValueError(f"{where}: layer_type is {values['layer_type']!r}, only 'bottleneck' is implemented")
    if values.get("downsample_in_bottleneck") or values.get("downsample_in_first_stage"):
        raise ValueError(f"{where}: a ResNet with the stride elsewhere than in the 3x3 convolution")
    return ResNetConfig(
        depths=tuple(values.get("depths", (3, 4, 6, 3))),
        stem_channels=values.get("embedding_size", 64),
        bottleneck_channels=values.get("hidden_sizes", [256])[0] // 4,
    )


FAMILY = BackboneFamily(
    model=ResNet,
    config=ResNetConfig,
    infer=infer,
    formats=lambda: (
        Format("ResNet of detectron2", (r"stem\.conv1\.weight", r"res2\.0\.conv1"), DETECTRON2),
        Format("ResNet of transformers", (r"embedder\.embedder\.convolution",), HF),
        Format("ResNet of torchvision", (r"^conv1\.weight", r"^layer1\.0\.conv3"), TORCHVISION),
    ),
    reference=Inside(r"stem\.conv1", DETECTRON2),
    transformers=InTransformers(
        mark=r"embedder\.embedder", table=HF, model_type="resnet", write_json=_write_json, read_json=_read_json
    ),
)
