"""Training of a whole, very small CropFormer on files: devices, accumulation, data, losses."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import tiny
from esg_jax.input.pipeline import train_iterator
from esg_jax.train.config import RunConfig
from esg_jax.train.sharding import make_mesh, put_batch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tiny_data) -> RunConfig:
    config = RunConfig.from_dict(tiny.get_config(str(tiny_data)).to_dict())
    return dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=8))


@pytest.fixture(scope="module")
def batches(run):
    iterator = train_iterator(run.data)
    found = [next(iterator) for _ in range(5)]
    iterator.close()
    return found


def train(run, batches, *, devices=1, model=1):
    step = run.train_step(mesh=make_mesh(1, -1, model, devices=jax.devices()[:devices]))
    state, history = step.init(), []
    for batch in batches:
        state, metrics = step(state, put_batch(batch, step.mesh))
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history


@pytest.fixture(scope="module")
def one_device(run, batches):
    return train(run, batches)


def test_every_term_is_there_and_adds_up(one_device):
    _, history = one_device
    expected = {
        f"loss_{term}{index}_{level}"
        for term in ("ce", "mask", "dice")
        for index in ("_0", "")
        for level in ("2d", "3d")
    }
    terms = {name for name in history[0] if name.startswith("loss_")}
    assert terms == expected
    for metrics in history:
        np.testing.assert_allclose(metrics["loss"], sum(metrics[name] for name in terms), rtol=1e-5)
        assert metrics["bad_steps"] == 0


def test_eight_devices_equal_one(run, batches, one_device):
    """Weights split over 4 x 2 devices, drop path on: the losses of five steps differ by rounding only."""
    state_8, history_8 = train(run, batches, devices=8, model=2)
    specs = {str(value.sharding.spec) for value in state_8.params.values()}
    assert "PartitionSpec('fsdp', 'model')" in specs and "PartitionSpec('model', 'fsdp')" in specs
    for name in ("loss", "loss_ce_2d", "loss_mask_3d", "loss_dice_0_3d"):
        ours = [metrics[name] for metrics in history_8]
        np.testing.assert_allclose(ours, [metrics[name] for metrics in one_device[1]], rtol=1e-5, atol=1e-5)


def test_accumulation_equals_the_big_batch(run, batches):
    """Without drop path, whose random numbers are drawn per micro-batch."""
    backbone = dataclasses.replace(run.model.backbone, drop_path_rate=0.0)
    still = dataclasses.replace(run, model=dataclasses.replace(run.model, backbone=backbone))
    big, history_big = train(still, batches[:2])
    small, history_small = train(dataclasses.replace(still, accumulate=2), batches[:2])
    for name, value in history_big[0].items():
        np.testing.assert_allclose(history_small[0][name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(history_small[1]["loss"], history_big[1]["loss"], rtol=1e-4)
    assert int(small.step) == int(big.step) == 2
