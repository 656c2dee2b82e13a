"""GELLA for PyTorch: every parameter has a name there, comes back bit for bit, and gives the same outputs."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import esg_jax
from esg_jax.interop.checkpoints import save_arrays, save_checkpoint
from esg_jax.interop.convert import ConversionError, from_ours, load_into, targets_of
from esg_jax.interop.families.gella import gella_table, verify
from esg_jax.interop.readers import open_checkpoint
from esg_jax.models.backbones.mobilenet_v2 import MobileNetV2Config
from esg_jax.models.gella import Gella, GellaConfig
from esg_jax.models.gella.entity_variants import RoiAlignConfig
from esg_jax.models.gella.grounding_association import GroundingAssociation, GroundingAssociationConfig
from esg_jax.models.gella.resoblend import ResoBlend, ResoBlendConfig
from esg_jax.models.language.llava import PROJECTORS, Projector
from esg_jax.models.language.lora import merge
from esg_jax.weights import save_weights


def random_model(config):
    """Weights of order one, so that no term of the network is negligible; nothing is compiled for them."""
    return filled(nnx.eval_shape(lambda: Gella(config, rngs=nnx.Rngs(0))))


def filled(model):
    """Random weights in an abstract model."""
    rng = np.random.default_rng(1)
    arrays = {}
    for name, x in targets_of(model).items():
        value = rng.normal(size=x.shape) / np.sqrt(max(1, np.prod(x.shape[-2:-1])))
        arrays[name] = (1 + 0.2 * np.tanh(value) if name.endswith(("scale", "var")) else value).astype(np.float32)
    return load_into(model, arrays)


TINY_BLEND = ResoBlendConfig(dim=32, num_heads=4, ffn_dim=48)


@pytest.fixture(scope="module")
def variants(tiny_gella_config):
    """Together they have every parameter."""
    plain = dataclasses.replace(tiny_gella_config, lora=None)
    literal = dataclasses.replace(TINY_BLEND, mode="paper", ca_residual=True, conv_norm=True, ca_kv_pool=2)
    return {
        "adapters": dataclasses.replace(
            tiny_gella_config,
            association=GroundingAssociationConfig(dim=16, depth=2, scale="learned"),
            select_layer=-1,
            seg_hidden="predict",
        ),
        "literal": dataclasses.replace(
            plain,
            entities=dataclasses.replace(plain.entities, resoblend=literal),
            association=GroundingAssociationConfig(dim=16, depth=2, scale="learned"),
            projector="linear",
        ),
        "mobilenet, no text": dataclasses.replace(
            plain,
            vision=MobileNetV2Config(),
            entities=dataclasses.replace(plain.entities, colormap_encoder=MobileNetV2Config(train_affine=True)),
            llm=None,
        ),
    }


@pytest.mark.torch
@pytest.mark.slow
def test_pytorch_gives_the_same_outputs(variants, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")

    model = random_model(variants["adapters"])
    save_checkpoint(tmp_path / "out", model)
    for item in verify(tmp_path / "out", model):
        assert item.absolute < 1e-4, item


def test_what_pytorch_has_no_modules_for(variants, tmp_path):
    """Other embeddings of entities, keys masked in the padding, centred squares."""
    plain = variants["mobilenet, no text"]
    masked = dataclasses.replace(plain.entities, key_padding=True)
    for config, message in (
        (GellaConfig(entities=RoiAlignConfig()), "no PyTorch modules for GELLA with RoiAlignConfig"),
        (dataclasses.replace(plain, entities=masked), "know no key_padding"),
        (dataclasses.replace(plain, pad_position="center"), "no pad_position but bottom_right"),
        (dataclasses.replace(plain, image_size=64, vision_stride=16), "know no vision_stride 16"),
    ):
        with pytest.raises(ConversionError, match=message):
            save_arrays(tmp_path / "out", {}, config)
    assert not (tmp_path / "out").exists()


@pytest.mark.torch
@pytest.mark.parametrize("scale", ["none", "sqrt_dim", "learned"])
def test_association_in_pytorch(scale):
    torch = pytest.importorskip("torch")
    from esg_jax.interop.pytorch.gella import Association as Reference

    config = GroundingAssociationConfig(dim=16, depth=2 if scale == "none" else 1, scale=scale)
    model = filled(nnx.eval_shape(lambda: GroundingAssociation(config, 24, 32, rngs=nnx.Rngs(0))))
    state = from_ours({f"association.{name}": x for name, x in targets_of(model).items()}, gella_table())
    theirs = Reference(dataclasses.asdict(config), 24, 32)
    theirs.load_state_dict({n.removeprefix("association."): torch.from_numpy(np.array(x)) for n, x in state.items()})
    rng = np.random.default_rng(0)
    text, entity = (rng.normal(size=(2, n, c)).astype(np.float32) for n, c in ((3, 24), (5, 32)))
    with torch.inference_mode():
        wanted = theirs(torch.from_numpy(text), torch.from_numpy(entity)).numpy()
    np.testing.assert_allclose(model(text, entity), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("kind", PROJECTORS)
def test_projector_in_pytorch(kind):
    torch = pytest.importorskip("torch")
    from esg_jax.interop.pytorch.gella import Projector as Reference

    model = filled(nnx.eval_shape(lambda: Projector(kind, 24, 32, rngs=nnx.Rngs(0))))
    state = from_ours({f"projector.{name}": x for name, x in targets_of(model).items()}, gella_table())
    theirs = Reference(kind, 24, 32)
    theirs.load_state_dict({n.removeprefix("projector."): torch.from_numpy(np.array(x)) for n, x in state.items()})
    x = np.random.default_rng(0).normal(size=(2, 3, 24)).astype(np.float32)
    with torch.inference_mode():
        wanted = theirs(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(model(x), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(mode="paper", ca_residual=True, conv_norm=True, ca_kv_pool=2),
        dict(mode="pixel_query"),
        dict(mode="pixel_query", use_res=False, use_conv=False),
        dict(use_sa=False, use_ff=False, use_res=False, use_conv=False),
        dict(use_ca=False),
    ],
    ids=str,
)
def test_resoblend_in_pytorch(changes):
    torch = pytest.importorskip("torch")
    from esg_jax.interop.pytorch.gella import ResoBlend as Reference

    config = dataclasses.replace(TINY_BLEND, **changes)
    channels = (8, 12, 16, 20)
    model = filled(nnx.eval_shape(lambda: ResoBlend(config, 24, channels, rngs=nnx.Rngs(0))))
    prefix = "visual.entity_encoder.resoblend."
    state = from_ours({prefix + name: x for name, x in targets_of(model).items()}, gella_table())
    theirs = Reference(dataclasses.asdict(config), 24, channels)
    theirs.load_state_dict({n.removeprefix("resoblend."): torch.from_numpy(np.array(x)) for n, x in state.items()})
    rng = np.random.default_rng(0)
    image = rng.normal(size=(2, 3, 3, 24)).astype(np.float32)
    features = [rng.normal(size=(2, 16 >> i, 24 >> i, c)).astype(np.float32) for i, c in enumerate(channels)]
    tensors = [torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for x in (image, *features)]
    with torch.inference_mode():
        wanted = theirs(tensors[0], tensors[1:])
    for ours, map_ in zip(jax.jit(ResoBlend.__call__)(model, image, tuple(features)), wanted, strict=True):
        np.testing.assert_allclose(ours, map_.numpy().transpose(0, 2, 3, 1), atol=1e-4, rtol=1e-4)


def test_adapters_become_part_of_the_language_model(variants, tmp_path):
    model = random_model(variants["adapters"])
    save_weights(tmp_path / "ours.safetensors", model)
    save_arrays(tmp_path / "out", open_checkpoint(tmp_path / "ours.safetensors"), model.config)
    again = esg_jax.load(tmp_path / "out")
    assert again.config == dataclasses.replace(model.config, lora=None)
    for key, value in targets_of(merge(model.llm, model.lora)).items():
        np.testing.assert_array_equal(targets_of(again.llm)[key], value, err_msg=key)


@pytest.mark.parametrize("name", ["literal", "mobilenet, no text"])
def test_round_trip_is_bit_equal(name, variants, tmp_path):
    model = random_model(variants[name])
    arrays = {key: np.asarray(x) for key, x in targets_of(model).items()}
    save_weights(tmp_path / "ours.safetensors", model)
    save_arrays(tmp_path / "one", arrays, model.config)
    save_arrays(tmp_path / "two", open_checkpoint(tmp_path / "ours.safetensors"), model.config)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
    again = esg_jax.load(tmp_path / "two")
    assert again.config == model.config
    for key, value in targets_of(again).items():
        np.testing.assert_array_equal(value, arrays[key], err_msg=key)


def test_what_is_refused(variants, tmp_path):
    model = random_model(variants["adapters"])
    with pytest.raises(ConversionError, match="no format 'original' for a GellaConfig; choose transformers"):
        save_checkpoint(tmp_path / "out", model, "original")
    with pytest.raises(ConversionError, match="vocab_size is for language models, not for a GellaConfig"):
        save_arrays(tmp_path / "out", targets_of(model), model.config, vocab_size=60)
    assert not list(tmp_path.iterdir())
    save_checkpoint(tmp_path / "out", model)
    (tmp_path / "out" / "llm" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="llm holds none of"):
        esg_jax.load(tmp_path / "out")
