"""docs/extending.md, "How to add a system": the code of the page trains and is stored without editing the package."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import esg_jax
from esg_jax.inference.bundle import open_bundle
from esg_jax.systems import SYSTEMS, system_of
from esg_jax.train.config import RunConfig
from esg_jax.weights import named_arrays

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def dimmer(tmp_path_factory):
    """The code of the page as a file, and as a module of this process."""
    page = (REPO / "docs" / "extending.md").read_text()
    (text,) = re.findall(r"^## How to add a system\n(.*?)(?=^## |\Z)", page, re.M | re.S)
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    file = tmp_path_factory.mktemp("outside") / "dimmer.py"
    file.write_text(code)
    known = list(SYSTEMS)
    spec = importlib.util.spec_from_file_location("dimmer", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    SYSTEMS[:] = known


@pytest.fixture(scope="module")
def workdir(dimmer, tmp_path_factory):
    """Two steps of it, in a process that has seen no toy before."""
    workdir = tmp_path_factory.mktemp("run")
    arguments = [f"--config={dimmer.__file__}", f"--workdir={workdir}", "--config.model.width=16"]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, str(REPO / "train.py"), *arguments],
        capture_output=True, text=True, cwd=workdir, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return workdir


def test_it_trains(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss_squared"] for line in lines if "loss_squared" in line]
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)


def test_it_is_stored_and_loaded(dimmer, workdir):
    path = workdir / "model.safetensors"
    model = esg_jax.load(path)
    assert type(model) is dimmer.Dimmer and model.config == dimmer.DimmerConfig(width=16)
    untrained = dimmer.Dimmer(model.config, rngs=dimmer.nnx.Rngs(0))
    before, after = named_arrays(untrained), named_arrays(model)
    assert before.keys() == after.keys() and any((before[name] != after[name]).any() for name in before)
    assert model(jnp.asarray(dimmer.NoiseConfig().batch(0)["image"])).shape == (8,)
    bundle = open_bundle(path)
    assert bundle.system is system_of(dimmer.DimmerConfig) and bundle.info["inference"] == {"size": 16}
    run = RunConfig.from_dict(bundle.info["config"])
    assert run.system.name == "Dimmer" and run.loss == dimmer.SquaredConfig()
    np.testing.assert_equal(run.system.batch_shapes(run, 0, 0)["image"].shape, (8, 16, 16, 3))


def test_what_it_does_not_do_is_said(dimmer, workdir):
    bundle = open_bundle(workdir / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors holds a Dimmer, which finds no entities"):
        bundle.system.predictor(bundle)
    with pytest.raises(ValueError, match="holds a Dimmer, which grounds no text"):
        bundle.system.grounder(bundle)
    with pytest.raises(ValueError, match="Dimmer needs data of type NoiseConfig, not DimmerConfig"):
        RunConfig(dimmer.DimmerConfig(), dimmer.DimmerConfig())


def test_without_its_entry_it_is_unknown(dimmer, monkeypatch):
    monkeypatch.setattr("esg_jax.systems.SYSTEMS", [s for s in SYSTEMS if s.name != "Dimmer"])
    with pytest.raises(ValueError, match="no system has a model of type DimmerConfig; choose one of CropFormerConfig"):
        system_of(dimmer.DimmerConfig())
