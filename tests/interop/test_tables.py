"""Names, shapes and round trips of every format, against lists taken from the original implementations."""

import functools
import json
import tracemalloc

import numpy as np
import pytest
from flax import nnx

from esg_jax.interop.checkpoints import load_checkpoint, save_checkpoint
from esg_jax.interop.convert import (
    ConversionError,
    from_ours,
    load_into,
    our_shapes,
    stream_to_ours,
    targets_of,
    to_ours,
)
from esg_jax.interop.families import detect
from esg_jax.interop.families.backbones import mobilenet_v2, resnet, swin
from esg_jax.interop.families.cropformer import infer_config, reference_table
from esg_jax.interop.families.family import BackboneFamily
from esg_jax.interop.families.mask2former import transformers_table
from esg_jax.interop.readers import load_torch_state, open_checkpoint, reader_of
from esg_jax.interop.rules import Table, fill, linear, match
from esg_jax.interop.writers import write_pth, write_safetensors
from esg_jax.models.backbones.mobilenet_v2 import MobileNetV2, MobileNetV2Config
from esg_jax.models.backbones.resnet import ResNet, ResNetConfig
from esg_jax.models.backbones.swin import Swin, SwinConfig
from esg_jax.models.cropformer import CropFormer, CropFormerConfig
from esg_jax.models.cropformer.mask_decoder import MaskDecoderConfig
from esg_jax.models.cropformer.pixel_decoder import PixelDecoderConfig
from esg_jax.models.cropformer.view_association import AssociationConfig

REFERENCE = {
    "cropformer_swin_tiny_3x": CropFormerConfig.swin_tiny(),
    "cropformer_swin_large_3x": CropFormerConfig.swin_large(),
    "cropformer_mask2former_swin_tiny_3x": CropFormerConfig.swin_tiny().without_views(),
    "cropformer_mask2former_swin_large_3x": CropFormerConfig.swin_large().without_views(),
    "cropformer_mask2former_R_50_entity": CropFormerConfig.resnet50().without_views(),
    "cropformer_mask2former_R_50_instance": CropFormerConfig.resnet50().without_views(num_classes=206),
}
BACKBONES = {
    "alt/swin_t.microsoft": (Swin, SwinConfig.tiny(), "Swin of Microsoft"),
    "alt/swin_l.microsoft": (Swin, SwinConfig.large(window_size=12), "Swin of Microsoft"),
    "alt/swin_t.timm": (Swin, SwinConfig.tiny(), "Swin of timm"),
    "alt/swin_t.torchvision": (Swin, SwinConfig.tiny(), "Swin of torchvision"),
    "swin_t": (Swin, SwinConfig.tiny(), "Swin of transformers"),
    "swin_l": (Swin, SwinConfig.large(window_size=12), "Swin of transformers"),
    "alt/swin_t.transformers5": (Swin, SwinConfig.tiny(), "Swin of transformers"),
    "alt/mobilenet_v2.torchvision": (MobileNetV2, MobileNetV2Config(), "MobileNetV2 of torchvision"),
    "mobilenet_v2": (MobileNetV2, MobileNetV2Config(), "MobileNetV2 of transformers"),
    "alt/mobilenet_v2.transformers5": (MobileNetV2, MobileNetV2Config(), "MobileNetV2 of transformers"),
}


def tiny(backbone, association=True):
    """A model of a few thousand parameters."""
    return CropFormerConfig(
        backbone=backbone,
        pixel_decoder=PixelDecoderConfig(conv_dim=32, mask_dim=32, num_layers=2, num_heads=8, ffn_dim=48),
        mask_decoder=MaskDecoderConfig(
            hidden_dim=32, mask_dim=32, num_heads=8, ffn_dim=40, num_layers=2, num_queries=5, num_classes=3
        ),
        association=AssociationConfig(ffn_dim=24) if association else None,
    )


TINY = {
    "swin": tiny(SwinConfig(embed_dim=8, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 4), window_size=4)),
    "resnet": tiny(ResNetConfig(depths=(1, 2, 1, 1), stem_channels=8, bottleneck_channels=8)),
    "mobilenet": tiny(MobileNetV2Config()),
}


@functools.cache
def abstract(cls, config):
    return targets_of(nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0))))


def empty(shapes):
    """Arrays of the given shapes that take no memory."""
    return {name: np.broadcast_to(np.zeros((), x.dtype), x.shape) for name, x in shapes.items()}


def random_model(config, seed=0):
    """A model with random parameters; nothing is compiled."""
    return load_into(abstract_model(config), random_arrays(abstract(CropFormer, config), seed))


@functools.cache
def abstract_model(config):
    return nnx.eval_shape(lambda: CropFormer(config, rngs=nnx.Rngs(0)))


def random_arrays(shapes, seed=0):
    """Different values for every parameter."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=x.shape).astype(np.float32) for name, x in shapes.items()}


def expected_dtype(name):
    return np.int64 if name.endswith(("relative_position_index", "num_batches_tracked")) else np.float32


@pytest.mark.parametrize("name", REFERENCE)
def test_reference_names_and_shapes_are_exact(name, shared):
    config = REFERENCE[name]
    manifest = json.loads(shared("manifests", f"{name}.json").read_text())
    ours = abstract(CropFormer, config)
    table = reference_table(type(config.backbone), association=config.association is not None, reading=False)
    written = from_ours(empty(ours), table)
    assert {key: list(x.shape) for key, x in written.items()} == manifest
    assert {key: x.dtype for key, x in written.items()} == {key: expected_dtype(key) for key in manifest}

    reader = reader_of(written)
    family, found = detect(reader)
    assert not isinstance(family, BackboneFamily)
    assert infer_config(our_shapes(reader, found.table)) == config
    back, report = to_ours(reader, ours, found.table)
    assert {key: x.shape for key, x in back.items()} == {key: x.shape for key, x in ours.items()}
    assert len(report.used) + len(report.buffers) == len(manifest)


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_names_and_shapes(name, shared):
    cls, config, format_name = BACKBONES[name]
    manifest = json.loads(shared("manifests", f"{name}.json").read_text())
    _, found = detect(manifest)
    assert found.name == format_name
    ours = abstract(cls, config)
    written = from_ours({k: v for k, v in empty(ours).items() if not k.startswith("norms.")}, found.table)
    # What we write spells like the manifest, up to renames of newer versions; the rest of the manifest is dropped.
    zeros = {key: np.broadcast_to(np.zeros((), expected_dtype(key)), shape) for key, shape in manifest.items()}
    zeros.update({key: x for key, x in written.items() if key in zeros})  # buffers with their real content
    for key, x in written.items():
        if key in manifest:
            assert list(x.shape) == manifest[key] and x.dtype == expected_dtype(key)
    converted, report = to_ours(zeros, ours, found.table, allow_missing=found.absent)
    assert {k: v.shape for k, v in converted.items()} == {
        k: v.shape for k, v in ours.items() if not k.startswith("norms.")
    }
    assert not report.ignored
    assert len(report.used) + len(report.buffers) + len(report.dropped) == len(manifest)
    if "transformers5" not in name:
        bare = {key.removeprefix("mobilenet_v2.") for key in manifest}
        assert bare - {key.removeprefix("mobilenet_v2.") for key in written} == {
            key.removeprefix("mobilenet_v2.") for key in report.dropped
        }


@pytest.mark.parametrize("association", [True, False])
@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_round_trip_through_files_is_bit_equal(name, association, suffix, tmp_path):
    config = TINY[name] if association else TINY[name].without_views(num_classes=3)
    model = random_model(config)
    save_checkpoint(tmp_path / f"model{suffix}", model)
    again, report = load_checkpoint(tmp_path / f"model{suffix}")
    assert again.config == config
    assert not (report.missing or report.ignored or report.dropped)
    for key, value in targets_of(model).items():
        np.testing.assert_array_equal(value, targets_of(again)[key], err_msg=key)


@pytest.mark.parametrize("name", ["swin", "resnet"])
def test_round_trip_through_transformers_names(name):
    config = TINY[name].without_views(num_classes=3)
    table = transformers_table(type(config.backbone))
    ours = random_arrays(abstract(CropFormer, config))
    back, _ = to_ours(from_ours(ours, table), ours, table)
    assert list(back) == list(ours)
    for key, value in ours.items():
        np.testing.assert_array_equal(value, back[key], err_msg=key)


@pytest.mark.parametrize(
    ("cls", "config", "table"),
    [
        (Swin, TINY["swin"].backbone, swin.DETECTION),
        (Swin, TINY["swin"].backbone, swin.HF_BACKBONE),
        (ResNet, TINY["resnet"].backbone, resnet.DETECTRON2),
        (ResNet, TINY["resnet"].backbone, resnet.TORCHVISION),
        (ResNet, TINY["resnet"].backbone, resnet.HF),
        (MobileNetV2, MobileNetV2Config(), mobilenet_v2.TORCHVISION),
        (MobileNetV2, MobileNetV2Config(), mobilenet_v2.HF),
    ],
)
def test_backbone_round_trips_with_permuted_keys(cls, config, table):
    ours = random_arrays(abstract(cls, config))
    theirs = from_ours(ours, table)
    shuffled = {name: theirs[name] for name in np.random.default_rng(0).permutation(list(theirs))}
    back, _ = to_ours(shuffled, ours, table)
    for key, value in ours.items():
        np.testing.assert_array_equal(value, back[key], err_msg=key)


def test_every_layout_moves_each_number_to_one_place(shared):
    """The reference's tensors of the golden file survive ours and back, bit for bit, buffers included."""
    golden = np.load(shared("fixtures", "cropformer", "infer_dev.npz"))
    state = {name.removeprefix("param/"): golden[name] for name in golden.files if name.startswith("param/")}
    reader = reader_of(state)
    _, found = detect(state)
    config = infer_config(our_shapes(reader, found.table))
    arrays, report = to_ours(state, abstract(CropFormer, config), found.table)
    assert len(report.used) + len(report.buffers) == len(state)
    back = from_ours(arrays, reference_table(SwinConfig, association=True, reading=False))
    assert set(back) == set(state)
    for name, value in state.items():
        assert back[name].dtype == value.dtype
        np.testing.assert_array_equal(back[name], value, err_msg=name)


@pytest.fixture
def old_spelling():
    """A Mask2Former state dict under the names of old releases, and ours."""
    config = TINY["swin"].without_views(num_classes=3)
    ours = random_arrays(abstract(CropFormer, config))
    theirs = from_ours(ours, reference_table(SwinConfig, association=False, reading=False))
    return ours, theirs


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"module.{name}",
        lambda name: f"model.{name}",
        lambda name: name.replace("query_feat", "static_query"),
        lambda name: name.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.pixel_decoder.pixel_decoder."),
        lambda name: name.replace("sem_seg_head.pixel_decoder.", "sem_seg_head."),
    ],
    ids=["module", "model", "static_query", "doubled", "version 1"],
)
def test_old_spellings(old_spelling, rename):
    ours, theirs = old_spelling
    renamed = {rename(name): value for name, value in theirs.items()}
    assert set(renamed) != set(theirs)
    back, _ = to_ours(renamed, ours, detect(renamed)[1].table)
    for key, value in ours.items():
        np.testing.assert_array_equal(value, back[key], err_msg=key)


def test_cropformer_from_mask2former_needs_permission(old_spelling, tmp_path):
    ours, theirs = old_spelling
    write_pth(tmp_path / "m2f.pth", theirs.items(), {})
    with pytest.raises(ConversionError, match=r"nothing for our association.*--allow-missing"):
        load_checkpoint(tmp_path / "m2f.pth", config=TINY["swin"])
    model, report = load_checkpoint(tmp_path / "m2f.pth", config=TINY["swin"], allow_missing="^association")
    assert report.missing and all(name.startswith("association.") for name in report.missing)
    np.testing.assert_array_equal(targets_of(model)["mask_decoder.query_feat"], ours["mask_decoder.query_feat"])
    assert np.abs(targets_of(model)["association.layers.0.cross.attention.query.kernel"]).max() > 0


def test_templates():
    assert match("layer{s+1}.{b}.conv1", "layer3.0.conv1") == {"s": 2, "b": 0}
    assert match("features.{s*2+1}.{b}", "features.5.1") == {"s": 2, "b": 1}
    assert match("features.{s*2+1}.{b}", "features.4.1") is None  # not one of that layer
    assert match("layer{s+1}", "layer0") is None
    assert match("a.{i}.b.{i}", "a.1.b.2") is None
    assert fill("features.{s*2+2}.{b}", {"s": 2, "b": 7}) == "features.6.7"


@pytest.fixture
def state():
    config = TINY["swin"]
    ours = random_arrays(abstract(CropFormer, config))
    return ours, from_ours(ours, reference_table(SwinConfig, association=True, reading=False))


TABLE = reference_table(SwinConfig, association=True, reading=True)
QKV = "backbone.layers.0.blocks.0.attn.qkv.weight"


def test_extra_tensor(state):
    ours, theirs = state
    theirs["backbone.mystery"] = np.zeros(3, np.float32)
    with pytest.raises(ConversionError, match="no use for backbone.mystery"):
        to_ours(theirs, ours, TABLE)
    _, report = to_ours(theirs, ours, TABLE, allow_unused="mystery")
    assert report.ignored == ["backbone.mystery"]


def test_tensor_of_a_layer_the_model_does_not_have(state):
    ours, theirs = state
    theirs["backbone.layers.0.blocks.7.norm1.weight"] = np.zeros(8, np.float32)
    with pytest.raises(ConversionError, match=r"no use for backbone\.layers\.0\.blocks\.7"):
        to_ours(theirs, ours, TABLE)


def test_missing_tensor(state):
    ours, theirs = state
    del theirs[QKV]
    with pytest.raises(ConversionError, match=r"nothing for our backbone\.stages\.0\.0\.attention\.qkv\.kernel"):
        to_ours(theirs, ours, TABLE)


def test_part_of_a_joined_tensor_is_missing():
    config = TINY["swin"].without_views(num_classes=3)
    table = transformers_table(SwinConfig)
    ours = random_arrays(abstract(CropFormer, config))
    theirs = from_ours(ours, table)
    gone = next(name for name in theirs if name.endswith("attention.self.key.weight"))
    del theirs[gone]
    with pytest.raises(ConversionError, match=f"lacks {gone}"):
        to_ours(theirs, ours, table)


def test_wrong_shape_names_both_sides(state):
    ours, theirs = state
    theirs[QKV] = np.zeros((24, 9), np.float32)
    message = r"backbone\.layers\.0\.blocks\.0\.attn\.qkv\.weight gives .*qkv\.kernel the shape \(9, 24\).*\(8, 24\)"
    with pytest.raises(ConversionError, match=message):
        to_ours(theirs, ours, TABLE)
    theirs[QKV] = np.zeros(24, np.float32)
    with pytest.raises(ConversionError, match=r"qkv\.weight \(24,\) cannot become .*qkv\.kernel \(8, 24\)"):
        to_ours(theirs, ours, TABLE)


def test_wrong_type(state):
    ours, theirs = state
    with pytest.raises(ConversionError, match=r"qkv\.weight holds int64 numbers"):
        to_ours({**theirs, QKV: theirs[QKV].astype(np.int64)}, ours, TABLE)
    half, _ = to_ours({**theirs, QKV: theirs[QKV].astype(np.float16)}, ours, TABLE)
    assert half["backbone.stages.0.0.attention.qkv.kernel"].dtype == np.float32


def test_another_window_size_is_noticed_by_the_stored_index(state):
    ours, theirs = state
    name = "backbone.layers.0.blocks.0.attn.relative_position_index"
    theirs[name] = theirs[name][::-1]
    with pytest.raises(ConversionError, match="relative_position_index.*window size"):
        to_ours(theirs, ours, TABLE)


def test_one_tensor_under_two_names(state):
    ours, theirs = state
    theirs[f"module.{QKV}"] = theirs[QKV]
    with pytest.raises(ConversionError, match="same tensor under two names"):
        to_ours(theirs, ours, TABLE)


def test_unknown_checkpoint(tmp_path):
    with pytest.raises(ConversionError, match="its first names are a, b; known formats are .*Swin of timm"):
        detect(["a", "b"])


def test_models_a_format_has_no_place_for(tmp_path):
    model = random_model(TINY["mobilenet"])
    with pytest.raises(ValueError, match="no views"):
        save_checkpoint(tmp_path / "out", model, "transformers")
    plain = random_model(TINY["mobilenet"].without_views(3))
    with pytest.raises(ValueError, match="no MobileNetV2 backbone"):
        save_checkpoint(tmp_path / "out", plain, "transformers")
    with pytest.raises(ValueError, match="ending must be"):
        save_checkpoint(tmp_path / "model.bin", model)
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    model = random_model(TINY["swin"])
    monkeypatch.setattr("esg_jax.interop.writers._tensor", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_checkpoint(tmp_path / "model.pth", model)
    assert not list(tmp_path.iterdir())


def test_bfloat16_checkpoint(state, tmp_path):
    import ml_dtypes

    ours, theirs = state
    layout = {
        name: (x.shape, np.dtype(ml_dtypes.bfloat16) if x.dtype == np.float32 else x.dtype)
        for name, x in theirs.items()
    }
    write_safetensors(tmp_path / "half.safetensors", layout, theirs.items())
    assert open_checkpoint(tmp_path / "half.safetensors").dtype(QKV) == ml_dtypes.bfloat16
    back, _ = to_ours(load_torch_state(tmp_path / "half.safetensors"), ours, TABLE)
    for key, value in ours.items():
        np.testing.assert_array_equal(value.astype(ml_dtypes.bfloat16).astype(np.float32), back[key], err_msg=key)


class CountingState(dict):
    """Makes a tensor of a mebibyte at each access."""

    def __getitem__(self, name):
        return np.ones((512, 512), np.float32)


def test_streaming_holds_one_tensor_at_a_time(tmp_path):
    names = [f"a.{index}.weight" for index in range(64)]
    targets = {f"b.{index}.kernel": np.broadcast_to(np.float32(0), (512, 512)) for index in range(64)}
    table = Table(rules=linear("a.{i}", "b.{i}", bias=False))
    layout = {name: (x.shape, x.dtype) for name, x in targets.items()}
    tracemalloc.start()
    try:
        arrays = stream_to_ours(CountingState.fromkeys(names), targets, table)
        write_safetensors(tmp_path / "out.safetensors", layout, arrays)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "out.safetensors").stat().st_size > 64 * 2**20
    assert peak < 6 * 2**20
