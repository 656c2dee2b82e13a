"""The real TPU compiler on a small model: the step really is sharded, and plans report memory."""

import dataclasses
import importlib.util

import pytest

from configs import tiny
from esg_jax.train.config import RunConfig
from esg_jax.train.plan import plan_training, tpu_devices

pytestmark = [
    pytest.mark.tpu_aot,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]


def test_training_step_compiles_for_a_slice():
    run = RunConfig.from_dict(tiny.get_config().to_dict())
    run = dataclasses.replace(
        run, data=dataclasses.replace(run.data, batch_size=4), remat=True, precision="bfloat16", accumulate=1
    )
    plan = plan_training(run, "v5e:2x2", 64, 64)
    assert plan.chips == 4
    # FSDP: weights are gathered for the forward pass, gradients summed over chips.
    assert plan.collectives.get("all-gather", 0) > 0
    assert plan.collectives.get("all-reduce", 0) + plan.collectives.get("reduce-scatter", 0) > 0
    assert 0 < plan.peak_bytes < 2**30
    assert plan.argument_bytes > 3 * 4 * 60_000 / 4  # parameters and two moments, a quarter per chip
    assert "4 chip(s); per chip: peak" in str(plan)


def test_unknown_topology_is_named():
    with pytest.raises(RuntimeError, match="cannot plan for 'v5e:banana'"):
        tpu_devices("v5e:banana")
