"""Name tables of the backbones, relative to the backbone on our side."""

import numpy as np

from esg_jax.interop.rules import (
    Buffer,
    Rule,
    Table,
    conv,
    frozen_batch_norm,
    joined_qkv,
    linear,
    norm,
    same,
)
from esg_jax.models.backbones.swin import relative_position_index

_BIAS_TABLE = "stages.{s}.{b}.attention.relative_position_bias_table"


def _index_of(table: np.ndarray) -> np.ndarray:
    """The pair index that belongs to a bias table of (2w - 1)**2 rows."""
    window = (round(table.shape[0] ** 0.5) + 1) // 2
    return relative_position_index(window).astype(np.int64)


def _constant(value: float):
    return lambda like: np.full(like.shape, value, np.float32)


def _packed_swin_block(theirs: str, mlp: tuple[str, str]) -> tuple[Rule, ...]:
    """A block with one qkv projection, as everywhere but in transformers."""
    ours = "stages.{s}.{b}"
    return (
        *norm(f"{theirs}.norm1", f"{ours}.norm1"),
        *linear(f"{theirs}.attn.qkv", f"{ours}.attention.qkv"),
        *linear(f"{theirs}.attn.proj", f"{ours}.attention.proj"),
        *same(f"{theirs}.attn.relative_position_bias_table", _BIAS_TABLE),
        *norm(f"{theirs}.norm2", f"{ours}.norm2"),
        *linear(f"{theirs}.{mlp[0]}", f"{ours}.fc1"),
        *linear(f"{theirs}.{mlp[1]}", f"{ours}.fc2"),
    )


def _swin_patches(projection: str, layer_norm: str) -> tuple[Rule, ...]:
    return (*conv(projection, "patch_embed", bias=True), *norm(layer_norm, "patch_norm"))


def _merging(theirs: str) -> tuple[Rule, ...]:
    return (
        *linear(f"{theirs}.reduction", "merges.{s}.reduction", bias=False),
        *norm(f"{theirs}.norm", "merges.{s}.norm"),
    )


_SWIN_HEAD = (r"norm\.(weight|bias)", r"head\.(fc\.)?(weight|bias)")

# Microsoft's classification repository.
SWIN_MICROSOFT = Table(
    rules=(
        *_swin_patches("patch_embed.proj", "patch_embed.norm"),
        *_packed_swin_block("layers.{s}.blocks.{b}", ("mlp.fc1", "mlp.fc2")),
        *_merging("layers.{s}.downsample"),
    ),
    buffers=(Buffer("layers.{s}.blocks.{b}.attn.relative_position_index", _BIAS_TABLE, _index_of),),
    dropped=(*_SWIN_HEAD, r"layers\.\d+\.blocks\.\d+\.attn_mask"),
)

# The detection variant of Mask2Former and CropFormer: one norm per output.
SWIN_DETECTION = Table(rules=SWIN_MICROSOFT.rules + norm("norm{s}", "norms.{s}"), buffers=SWIN_MICROSOFT.buffers)

# timm puts the merging at the start of a stage.
SWIN_TIMM = Table(
    rules=(
        *_swin_patches("patch_embed.proj", "patch_embed.norm"),
        *_packed_swin_block("layers.{s}.blocks.{b}", ("mlp.fc1", "mlp.fc2")),
        *_merging("layers.{s+1}.downsample"),
    ),
    dropped=(*_SWIN_HEAD, r"layers\.\d+\.blocks\.\d+\.(attn_mask|attn\.relative_position_index)"),
)

SWIN_TORCHVISION = Table(
    rules=(
        *_swin_patches("features.0.0", "features.0.2"),
        *_packed_swin_block("features.{s*2+1}.{b}", ("mlp.0", "mlp.3")),
        *_merging("features.{s*2+2}"),
    ),
    buffers=(
        Buffer(
            "features.{s*2+1}.{b}.attn.relative_position_index",
            _BIAS_TABLE,
            lambda table: _index_of(table).reshape(-1),
        ),
    ),
    dropped=_SWIN_HEAD,
)

# transformers on disk; version 5 uses other names in memory, which `renames` maps back.
_HF_BLOCK, _OUR_BLOCK = "encoder.layers.{s}.blocks.{b}", "stages.{s}.{b}"
_SWIN_HF_BODY = Table(
    rules=(
        *_swin_patches("embeddings.patch_embeddings.projection", "embeddings.norm"),
        *norm(f"{_HF_BLOCK}.layernorm_before", f"{_OUR_BLOCK}.norm1"),
        *joined_qkv(
            [f"{_HF_BLOCK}.attention.self.{name}" for name in ("query", "key", "value")], f"{_OUR_BLOCK}.attention.qkv"
        ),
        *same(f"{_HF_BLOCK}.attention.self.relative_position_bias_table", _BIAS_TABLE),
        *linear(f"{_HF_BLOCK}.attention.output.dense", f"{_OUR_BLOCK}.attention.proj"),
        *norm(f"{_HF_BLOCK}.layernorm_after", f"{_OUR_BLOCK}.norm2"),
        *linear(f"{_HF_BLOCK}.intermediate.dense", f"{_OUR_BLOCK}.fc1"),
        *linear(f"{_HF_BLOCK}.output.dense", f"{_OUR_BLOCK}.fc2"),
        *_merging("encoder.layers.{s}.downsample"),
    ),
    renames=(
        (r"^(?:swin\.)?(embeddings|encoder)\.", r"\1."),
        (r"\.attention\.q_proj\.", ".attention.self.query."),
        (r"\.attention\.k_proj\.", ".attention.self.key."),
        (r"\.attention\.v_proj\.", ".attention.self.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"(encoder\.layers\.\d+\.blocks\.\d+)\.mlp\.fc1\.", r"\1.intermediate.dense."),
        (r"(encoder\.layers\.\d+\.blocks\.\d+)\.mlp\.fc2\.", r"\1.output.dense."),
        (r"\.attention\.relative_position_bias\.relative_position", ".attention.self.relative_position"),
    ),
    dropped=(r"encoder\.layers\.\d+\.blocks\.\d+\.attention\.self\.relative_position_index",),
)
# SwinForImageClassification and SwinModel.
SWIN_HF = Table(
    rules=_SWIN_HF_BODY.prefixed("swin.", "").rules,
    renames=(
        (r"^(embeddings|encoder|layernorm)\.", r"swin.\1."),
        *(rename for rename in _SWIN_HF_BODY.renames[1:]),
    ),
    dropped=(
        r"swin\.layernorm\.(weight|bias)",
        r"classifier\.(weight|bias)",
        *(rf"swin\.{pattern}" for pattern in _SWIN_HF_BODY.dropped),
    ),
)
# SwinBackbone: norms per output; the final norm of the classifier is stored, but has no effect.
SWIN_HF_BACKBONE = Table(
    rules=_SWIN_HF_BODY.rules + norm("hidden_states_norms.stage{s+1}", "norms.{s}"),
    buffers=(
        Buffer("swin.layernorm.weight", "norms.3.scale", _constant(1.0), checked=False),
        Buffer("swin.layernorm.bias", "norms.3.bias", _constant(0.0), checked=False),
    ),
    renames=_SWIN_HF_BODY.renames,
    dropped=_SWIN_HF_BODY.dropped,
)


def _counted(theirs: str, like: str) -> Buffer:
    """Batch norm's counter of training steps, which frozen statistics do not need."""
    return Buffer(f"{theirs}.num_batches_tracked", f"{like}.var", lambda _: np.zeros((), np.int64), checked=False)


def _conv_norm(theirs_conv: str, theirs_norm: str, ours: str) -> tuple[Rule, ...]:
    return (*conv(theirs_conv, f"{ours}.conv"), *frozen_batch_norm(theirs_norm, f"{ours}.norm"))


def _three(make) -> tuple:
    """`make(index from "0", index from "1")` for the convolutions of a bottleneck."""
    return tuple(item for index in range(3) for item in make(str(index), str(index + 1)))


_BLOCK = "stages.{s}.{b}"
RESNET_DETECTRON2 = Table(
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
RESNET_TORCHVISION = Table(
    rules=(
        *_conv_norm("conv1", "bn1", "stem"),
        *_three(lambda _, n: _conv_norm("layer{s+1}.{b}.conv" + n, "layer{s+1}.{b}.bn" + n, f"{_BLOCK}.conv{n}")),
        *_conv_norm("layer{s+1}.{b}.downsample.0", "layer{s+1}.{b}.downsample.1", f"{_BLOCK}.shortcut"),
    ),
    buffers=(
        _counted("bn1", "stem.norm"),
        *_three(lambda _, n: (_counted("layer{s+1}.{b}.bn" + n, f"{_BLOCK}.conv{n}.norm"),)),
        _counted("layer{s+1}.{b}.downsample.1", f"{_BLOCK}.shortcut.norm"),
    ),
    dropped=(r"fc\.(weight|bias)",),
)
_HF_STEM, _HF_STAGE = "embedder.embedder", "encoder.stages.{s}.layers.{b}"
RESNET_HF = Table(
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
        _counted(f"{_HF_STEM}.normalization", "stem.norm"),
        *_three(lambda i, n: (_counted(f"{_HF_STAGE}.layer.{i}.normalization", f"{_BLOCK}.conv{n}.norm"),)),
        _counted(f"{_HF_STAGE}.shortcut.normalization", f"{_BLOCK}.shortcut.norm"),
    ),
    renames=((r"^resnet\.", ""),),
    dropped=(r"classifier\.1\.(weight|bias)",),
)


def _mobilenet(parts: tuple[tuple[str, str, str], ...]) -> dict[str, tuple]:
    """Rules and counters from (their conv, their norm, our layer); a depthwise layer holds its kernel itself."""
    rules, buffers = [], []
    for theirs_conv, theirs_norm, ours in parts:
        depthwise = ours.endswith("depthwise")
        rules += conv(theirs_conv, ours if depthwise else f"{ours}.conv")
        rules += frozen_batch_norm(theirs_norm, f"{ours}.norm")
        buffers.append(_counted(theirs_norm, f"{ours}.norm"))
    return dict(rules=tuple(rules), buffers=tuple(buffers))


# Block 0 has no expansion, so its layers sit one place further left than those of the others.
_FIRST, _OTHER, _LATER = "features.1.conv", "features.{i+2}.conv", "blocks.{i+1}"
MOBILENET_TORCHVISION = Table(
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
MOBILENET_HF = Table(
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
