"""Portable weights: round trip, and one clear error per kind of bad file."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from esg_jax.models.backbones.swin import SwinConfig
from esg_jax.models.cropformer import CropFormer, CropFormerConfig
from esg_jax.models.cropformer.mask_decoder import MaskDecoderConfig
from esg_jax.models.cropformer.pixel_decoder import PixelDecoderConfig
from esg_jax.models.cropformer.view_association import AssociationConfig
from esg_jax.weights import load_model, named_arrays, read_info, save_weights


@pytest.fixture(scope="module")
def model():
    config = CropFormerConfig(
        backbone=SwinConfig(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=4),
        pixel_decoder=PixelDecoderConfig(conv_dim=32, mask_dim=32, num_layers=1, num_heads=2, ffn_dim=32),
        mask_decoder=MaskDecoderConfig(
            hidden_dim=32, mask_dim=32, num_heads=2, ffn_dim=32, num_layers=1, num_queries=5
        ),
        association=AssociationConfig(num_heads=2, ffn_dim=32),
    )
    return CropFormer(config, rngs=nnx.Rngs(0))


@pytest.fixture
def saved(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_weights(path, model, {"steps": 7})
    return path


def rewrite(path, change):
    with safe_open(path, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata()
    change(arrays)
    save_file(arrays, path, metadata)


def test_round_trip_is_exact(model, saved):
    again = load_model(saved)
    assert again.config == model.config
    assert read_info(saved)[1] == {"steps": 7}
    before, after = named_arrays(model), named_arrays(again)
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(value, after[name], err_msg=name)


def test_half_precision_halves_the_file_and_loads_as_float32(model, saved, tmp_path):
    small = tmp_path / "half.safetensors"
    save_weights(small, model, dtype=np.float16)
    assert small.stat().st_size < 0.6 * saved.stat().st_size
    arrays = named_arrays(load_model(small))
    assert {value.dtype for value in arrays.values()} == {jnp.dtype("float32")}
    for name, value in named_arrays(model).items():
        np.testing.assert_array_equal(np.asarray(value, np.float16), np.asarray(arrays[name], np.float16))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors"):
        load_model(tmp_path / "nowhere.safetensors")


def test_not_a_safetensors_file(tmp_path):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"this is no weight file")
    with pytest.raises(ValueError, match="broken.safetensors is not a readable"):
        load_model(path)


def test_truncated_file(saved):
    saved.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable"):
        load_model(saved)


def test_foreign_safetensors_file(tmp_path):
    path = tmp_path / "foreign.safetensors"
    save_file({"weight": np.zeros(3, np.float32)}, path)
    with pytest.raises(ValueError, match="esg convert"):
        load_model(path)


def test_missing_and_extra_names(saved):
    rewrite(saved, lambda arrays: arrays.pop("mask_decoder.query_feat"))
    with pytest.raises(ValueError, match="mask_decoder.query_feat"):
        load_model(saved)


def test_wrong_shape(saved):
    rewrite(saved, lambda arrays: arrays.update({"mask_decoder.query_feat": np.zeros((3, 3), np.float32)}))
    with pytest.raises(ValueError, match=r"mask_decoder.query_feat has shape \(3, 3\).*\(5, 32\)"):
        load_model(saved)


def test_a_failed_save_leaves_the_old_file(model, saved, monkeypatch):
    before = saved.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("esg_jax.weights.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_weights(saved, model)
    assert saved.read_bytes() == before


def test_weights_that_come_from_elsewhere_are_left_out_and_given(model, tmp_path):
    path = tmp_path / "part.safetensors"
    save_weights(path, model, leave_out=r"^backbone\.")
    with safe_open(path, framework="numpy") as file:
        assert not any(name.startswith("backbone.") for name in file.keys())
    given = {name: value for name, value in named_arrays(model).items() if name.startswith("backbone.")}
    loaded = named_arrays(load_model(path, given=given))
    for name, value in named_arrays(model).items():
        np.testing.assert_array_equal(loaded[name], value)
    with pytest.raises(ValueError, match="saved without the weights"):
        load_model(path)
