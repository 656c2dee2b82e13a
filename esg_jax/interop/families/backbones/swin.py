"""Swin under the names of Microsoft, of detectors, of timm, torchvision and transformers."""

import dataclasses

import numpy as np

from esg_jax.interop.families.family import BackboneFamily, Format, Inside, InTransformers, Json, Shapes, depths
from esg_jax.interop.rules import Buffer, Rule, Table, conv, joined_qkv, linear, norm, same
from esg_jax.models.backbones.swin import Swin, SwinConfig, relative_position_index

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


_HEAD = (r"norm\.(weight|bias)", r"head\.(fc\.)?(weight|bias)")

# Microsoft's classification repository.
MICROSOFT = Table(
    rules=(
        *_swin_patches("patch_embed.proj", "patch_embed.norm"),
        *_packed_swin_block("layers.{s}.blocks.{b}", ("mlp.fc1", "mlp.fc2")),
        *_merging("layers.{s}.downsample"),
    ),
    buffers=(Buffer("layers.{s}.blocks.{b}.attn.relative_position_index", _BIAS_TABLE, _index_of),),
    dropped=(*_HEAD, r"layers\.\d+\.blocks\.\d+\.attn_mask"),
)

# The detection variant of Mask2Former and CropFormer: one norm per output.
DETECTION = Table(rules=MICROSOFT.rules + norm("norm{s}", "norms.{s}"), buffers=MICROSOFT.buffers)

# timm puts the merging at the start of a stage.
TIMM = Table(
    rules=(
        *_swin_patches("patch_embed.proj", "patch_embed.norm"),
        *_packed_swin_block("layers.{s}.blocks.{b}", ("mlp.fc1", "mlp.fc2")),
        *_merging("layers.{s+1}.downsample"),
    ),
    dropped=(*_HEAD, r"layers\.\d+\.blocks\.\d+\.(attn_mask|attn\.relative_position_index)"),
)

TORCHVISION = Table(
    rules=(
        *_swin_patches("features.0.0", "features.0.2"),
        *_packed_swin_block("features.{s*2+1}.{b}", ("mlp.0", "mlp.3")),
        *_merging("features.{s*2+2}"),
    ),
    buffers=(
        Buffer(
            "features.{s*2+1}.{b}.attn.relative_position_index", _BIAS_TABLE, lambda table: _index_of(table).reshape(-1)
        ),
    ),
    dropped=_HEAD,
)

# transformers on disk; version 5 uses other names in memory, which `renames` maps back.
_HF_BLOCK, _OUR_BLOCK = "encoder.layers.{s}.blocks.{b}", "stages.{s}.{b}"
_HF_BODY = Table(
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
HF = Table(
    rules=_HF_BODY.prefixed("swin.", "").rules,
    renames=((r"^(embeddings|encoder|layernorm)\.", r"swin.\1."), *(rename for rename in _HF_BODY.renames[1:])),
    dropped=(
        r"swin\.layernorm\.(weight|bias)",
        r"classifier\.(weight|bias)",
        *(rf"swin\.{pattern}" for pattern in _HF_BODY.dropped),
    ),
)
# SwinBackbone: norms per output; the final norm of the classifier is stored, but has no effect.
HF_BACKBONE = Table(
    rules=_HF_BODY.rules + norm("hidden_states_norms.stage{s+1}", "norms.{s}"),
    buffers=(
        Buffer("swin.layernorm.weight", "norms.3.scale", _constant(1.0), checked=False),
        Buffer("swin.layernorm.bias", "norms.3.bias", _constant(0.0), checked=False),
    ),
    renames=_HF_BODY.renames,
    dropped=_HF_BODY.dropped,
)


def infer(shapes: Shapes, num_heads: int | None = None) -> SwinConfig:
    """Sizes from the shapes of a `Swin`, whose position biases show the heads."""
    blocks = depths(shapes)
    tables = [shapes[_BIAS_TABLE.format(s=stage, b=0)] for stage in range(len(blocks))]
    features, hidden = shapes["stages.0.0.fc1.kernel"]
    return SwinConfig(
        embed_dim=features,
        depths=blocks,
        num_heads=tuple(heads for _, heads in tables),
        window_size=(round(tables[0][0] ** 0.5) + 1) // 2,
        mlp_ratio=hidden / features,
    )


# The fields have the same names there; these are the defaults.
_HF_DEFAULTS = SwinConfig(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24))


def _read_json(values: Json, where: str) -> SwinConfig:
    fields = {name: values.get(name, default) for name, default in dataclasses.asdict(_HF_DEFAULTS).items()}
    return SwinConfig(**{name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()})


_NO_NORMS = r"^norms\."  # classifiers have none of the four outputs
FAMILY = BackboneFamily(
    model=Swin,
    config=SwinConfig,
    infer=infer,
    formats=lambda: (
        Format("Swin of Mask2Former", (r"^patch_embed\.proj", r"^norm0\."), DETECTION),
        Format(
            "Swin of transformers (backbone)",
            (r"hidden_states_norms\.stage1", r"patch_embeddings\.projection"),
            HF_BACKBONE,
        ),
        Format("Swin of transformers", (r"patch_embeddings\.projection", r"layernorm_before"), HF, _NO_NORMS),
        Format("Swin of timm", (r"^patch_embed\.proj", r"^layers\.3\.downsample"), TIMM, _NO_NORMS),
        Format("Swin of Microsoft", (r"^patch_embed\.proj", r"^layers\.0\.downsample"), MICROSOFT, _NO_NORMS),
        Format("Swin of torchvision", (r"^features\.1\.0\.attn\.qkv",), TORCHVISION, _NO_NORMS),
    ),
    reference=Inside(r"patch_embed", DETECTION),
    transformers=InTransformers(
        mark=r"embeddings\.patch_embeddings",
        table=HF_BACKBONE,
        model_type="swin",
        write_json=dataclasses.asdict,
        read_json=_read_json,
    ),
)
