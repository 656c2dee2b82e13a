"""Nothing outside `systems` and a system's own files knows which systems there are."""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import esg_jax
from esg_jax.inference.bundle import open_bundle
from esg_jax.interop.checkpoints import save_checkpoint
from esg_jax.models.backbones.swin import SwinConfig
from esg_jax.models.cropformer import CropFormerConfig
from esg_jax.models.gella import Gella, GellaConfig
from esg_jax.systems import SYSTEMS, system_of

ROOT = Path(esg_jax.__file__).parent
OWN = (
    "systems/",
    "models/",
    "losses/",
    "train/tasks.py",
    "inference/entities/",
    "inference/grounding/",
    "interop/families/",
    "interop/pytorch/",
)


def names_of_systems():
    """Classes that only a system's own files may name."""
    for system in SYSTEMS:
        yield from (system.config.__name__, system.module.__name__, type(system).__name__)
        yield system.loss_config().__name__
        yield from (config.__name__ for config in system.data_configs())


def used(tree):
    """Names that code takes from elsewhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, (ast.ImportFrom, ast.Import)):
            yield from (alias.name.split(".")[-1] for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value  # a class looked up by its name


def test_nothing_else_names_a_system():
    # What types a run's fields have is asked of `systems`, under names that the data and losses have there too.
    shared = {"DataConfig", "LossConfig", "GroundingDataConfig"}
    names = set(names_of_systems()) - shared
    assert {"CropFormerConfig", "CropFormer", "GellaConfig", "Gella", "GellaLossConfig"} <= names
    found = [
        f"{file.relative_to(ROOT)}: {name}"
        for file in sorted(ROOT.rglob("*.py"))
        if not str(file.relative_to(ROOT)).startswith(OWN)
        for name in sorted(names & set(used(ast.parse(file.read_text()))))
    ]
    assert not found


def test_every_module_of_the_package_asks_its_own_question():
    """`isinstance(..., SomethingConfig)` is dispatch, wherever it is not about a system's own parts."""
    allowed = OWN + ("input/",)  # readers accept a dictionary or the dataclass
    found = []
    for file in sorted(ROOT.rglob("*.py")):
        if str(file.relative_to(ROOT)).startswith(allowed):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                names = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
                found += [f"{file.relative_to(ROOT)}:{node.lineno}" for name in names if name.endswith("Config")]
    assert not found


def test_a_configuration_belongs_to_one_system():
    assert [system_of(kind).name for kind in (CropFormerConfig, GellaConfig)] == ["CropFormer", "GELLA"]
    assert system_of(CropFormerConfig(backbone=SwinConfig.tiny())).config is CropFormerConfig
    assert len({system.config for system in SYSTEMS}) == len(SYSTEMS)


@pytest.mark.parametrize("value", [SwinConfig.tiny(), None, {}, 3])
def test_any_other_is_refused(value):
    with pytest.raises(ValueError, match=f"no system has a model of type {type(value).__name__}; choose one of Crop"):
        system_of(value)


def test_checkpoint_families_are_listed():
    assert {family.written_as for family in system_of(CropFormerConfig).families()} >= {"reference", "transformers"}
    assert all(family.config is GellaConfig for family in system_of(GellaConfig).families())
    assert all(system.families() for system in SYSTEMS)


def test_a_checkpoint_of_pytorch_shows_its_system(tiny_gella_config, tmp_path):
    model = nnx.eval_shape(lambda: Gella(tiny_gella_config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
    save_checkpoint(tmp_path / "gella", nnx.merge(graph, zeros))
    bundle = open_bundle(tmp_path / "gella")
    assert bundle.config is None and bundle.system is system_of(GellaConfig)
    with pytest.raises(ValueError, match="gella holds a GELLA, which finds no entities"):
        bundle.system.predictor(bundle)
