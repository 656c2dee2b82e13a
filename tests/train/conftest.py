"""A compiled toy step, shared by all tests of this folder."""

import importlib.util
import sys
from pathlib import Path

import jax
import pytest

from esg_jax.train.optim import OptimConfig
from esg_jax.train.sharding import make_mesh
from esg_jax.train.step import StepConfig, TrainStep

# importlib import mode has no packages; the toy model is plain test support code.
_spec = importlib.util.spec_from_file_location("toy", Path(__file__).with_name("toy.py"))
toy = importlib.util.module_from_spec(_spec)
sys.modules["toy"] = toy
_spec.loader.exec_module(toy)

OPTIM = OptimConfig(learning_rate=1e-2, clip_norm=1.0)


def make_toy_step(*, devices: int = 1, model: int = 1, rules=None, optim: OptimConfig = OPTIM, **step) -> TrainStep:
    mesh = make_mesh(1, -1, model, devices=jax.devices()[:devices])
    kwargs = {} if rules is None else {"rules": rules}
    return TrainStep(
        toy.toy_model(), toy.ToyTask(), optim=optim, total_steps=20, mesh=mesh, config=StepConfig(**step), **kwargs
    )


@pytest.fixture(scope="session")
def toy_step() -> TrainStep:
    return make_toy_step(ema_decay=0.9)


@pytest.fixture(scope="session")
def make_step():
    return make_toy_step
