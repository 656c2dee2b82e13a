"""MobileNetV2 under the names of torchvision and transformers."""

from esg_jax.interop.families.family import BackboneFamily, Format, Inside, Shapes
from esg_jax.interop.rules import Table, batch_norm_counter, conv, frozen_batch_norm
from esg_jax.models.backbones.mobilenet_v2 import MobileNetV2, MobileNetV2Config


def _mobilenet(parts: tuple[tuple[str, str, str], ...]) -> dict[str, tuple]:
    """Rules and counters from (their conv, their norm, our layer); a depthwise layer holds its kernel itself."""
    rules, buffers = [], []
    for theirs_conv, theirs_norm, ours in parts:
        depthwise = ours.endswith("depthwise")
        rules += conv(theirs_conv, ours if depthwise else f"{ours}.conv")
        rules += frozen_batch_norm(theirs_norm, f"{ours}.norm")
        buffers.append(batch_norm_counter(theirs_norm, f"{ours}.norm"))
    return dict(rules=tuple(rules), buffers=tuple(buffers))


# Block 0 has no expansion, so its layers sit one place further left than those of the others.
_FIRST, _OTHER, _LATER = "features.1.conv", "features.{i+2}.conv", "blocks.{i+1}"
TORCHVISION = Table(
    **_mobilenet(
        (
            ("features.0.0", "features.0.1", "stem"),
            (f"{_FIRST}.0.0", f"{_FIRST}.0.1", "blocks.0.depthwise"),
            (f"{_FIRST}.1", f"{_FIRST}.2", "blocks.0.project"),
            (f"{_OTHER}.0.0", f"{_OTHER}.0.1", f"{_LATER}.expand"),
            (f"{_OTHER}.1.0", f"{_OTHER}.1.1", f"{_LATER}.depthwise"),
            (f"{_OTHER}.2", f"{_OTHER}.3", f"{_LATER}.project"),
        )
    ),
    dropped=(r"features\.18\..*", r"classifier\.1\.(weight|bias)"),
)
HF = Table(
    **_mobilenet(
        tuple(
            (f"{theirs}.convolution", f"{theirs}.normalization", ours)
            for theirs, ours in (
                ("conv_stem.first_conv", "stem"),
                ("conv_stem.conv_3x3", "blocks.0.depthwise"),
                ("conv_stem.reduce_1x1", "blocks.0.project"),
                ("layer.{i}.expand_1x1", f"{_LATER}.expand"),
                ("layer.{i}.conv_3x3", f"{_LATER}.depthwise"),
                ("layer.{i}.reduce_1x1", f"{_LATER}.project"),
            )
        )
    ),
    renames=((r"^mobilenet_v2\.", ""),),
    dropped=(r"conv_1x1\..*", r"classifier\.(weight|bias)"),
)


def infer(shapes: Shapes, num_heads: int | None = None) -> MobileNetV2Config:
    """There is one size."""
    return MobileNetV2Config()


FAMILY = BackboneFamily(
    model=MobileNetV2,
    config=MobileNetV2Config,
    infer=infer,
    formats=lambda: (
        Format("MobileNetV2 of torchvision", (r"^features\.1\.conv\.0\.0",), TORCHVISION),
        Format("MobileNetV2 of transformers", (r"conv_stem\.first_conv",), HF),
    ),
    # Does not occur in the reference; its models get torchvision's names.
    reference=Inside(r"features\.0\.0", TORCHVISION),
)
