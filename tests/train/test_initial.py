"""Weights a run starts from: what fits is taken, what does not is named."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from esg_jax.train.initial import fit_weights, read_weights

SHAPES = {
    "backbone.kernel": jax.ShapeDtypeStruct((2, 3), np.float32),
    "association.kernel": jax.ShapeDtypeStruct((4,), np.float32),
    "class_head.bias": jax.ShapeDtypeStruct((2,), np.float32),
}


def weights(**changes):
    values = {name: np.ones(shape.shape, np.float32) for name, shape in SHAPES.items()}
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in values.items() if value is not None}


def test_everything_fits():
    assert set(fit_weights(weights(), SHAPES)) == set(SHAPES)


def test_association_may_be_missing_when_optional():
    given = weights(association__kernel=None)
    assert set(fit_weights(given, SHAPES, optional=r"^association\.")) == {"backbone.kernel", "class_head.bias"}
    with pytest.raises(ValueError, match="association.kernel is missing"):
        fit_weights(given, SHAPES)


def test_new_head_of_another_size_starts_at_random():
    given = weights(class_head__bias=np.ones(134, np.float32))
    assert "class_head.bias" not in fit_weights(given, SHAPES, optional=r"^class_head")
    with pytest.raises(ValueError, match=r"class_head.bias has shape \(134,\), needed is \(2,\)"):
        fit_weights(given, SHAPES, optional=r"^association\.")


def test_unknown_names_are_refused_and_counted():
    given = weights(**{f"extra__{index}": np.ones(1) for index in range(7)})
    with pytest.raises(ValueError, match="extra.0 is unknown to the model") as error:
        fit_weights(given, SHAPES, source="some.safetensors")
    assert "some.safetensors does not fit config.model" in str(error.value) and "and 2 more" in str(error.value)


def test_reading_a_file(tmp_path):
    save_file(weights(), tmp_path / "w.safetensors")
    assert set(read_weights(tmp_path / "w.safetensors")) == set(SHAPES)
    (tmp_path / "bad.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="bad.safetensors is not a safetensors file"):
        read_weights(tmp_path / "bad.safetensors")
    with pytest.raises(FileNotFoundError, match="no file or workdir"):
        read_weights(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="not the workdir of a run"):
        read_weights(tmp_path)
