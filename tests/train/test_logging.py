"""Metric files, optional loggers, rates, and the count of operations behind them."""

import importlib
import json
import sys
import types
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import toy

from esg_jax.sharding import put_batch
from esg_jax.train.flops import count_flops, peak_flops
from esg_jax.train.logging import MetricWriter, Progress, log_progress


def test_loggers_are_imported_only_on_request(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(importlib, "import_module", lambda name: asked.append(name))
    writer = MetricWriter(tmp_path)
    writer.write(3, {"AP": 0.5, "AR": float("nan")}, prefix="eval/")
    writer.close()
    assert not asked
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 3, "eval/AP": 0.5, "eval/AR": "nan"}


@pytest.mark.parametrize(
    ("options", "package"), [({"tensorboard": True}, "tensorboardX"), ({"wandb": "project"}, "wandb")]
)
def test_missing_logger_is_named(tmp_path, monkeypatch, options, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"config\.{next(iter(options))} needs {package}: pip install"):
        MetricWriter(tmp_path, **options)


class FakeRun:
    def __init__(self, options):
        self.options, self.logged, self.finished = options, [], False

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished = True


@pytest.fixture
def fake_wandb(monkeypatch):
    module = types.ModuleType("wandb")
    module.Error = type("Error", (Exception,), {})
    module.runs = []

    def init(**options):
        module.runs.append(FakeRun(options))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_resumed_run_continues_its_entry(tmp_path, fake_wandb):
    for step in (1, 2):
        writer = MetricWriter(tmp_path / "mine", wandb="project", config={"seed": 0})
        writer.write(step, {"loss": 1.5})
        writer.close()
    first, second = fake_wandb.runs
    assert first.options == second.options and first.options["config"] == {"seed": 0}
    assert (first.options["project"], first.options["name"], first.options["resume"]) == ("project", "mine", "allow")
    assert first.logged == [{"step": 1, "loss": 1.5}] and second.logged == [{"step": 2, "loss": 1.5}]
    assert first.finished and second.finished


def test_refusal_of_the_logger_says_what_to_do(tmp_path, fake_wandb):
    def init(**_):
        raise fake_wandb.Error("no API key")

    fake_wandb.init = init
    with pytest.raises(ValueError, match="config.wandb: no API key .*WANDB_MODE=offline"):
        MetricWriter(tmp_path, wandb="project")


@pytest.mark.slow
def test_real_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    writer = MetricWriter(tmp_path, wandb="project", config={"model": {"sizes": (1, 2), "none": None}})
    writer.write(1, {"loss": float("inf")})
    writer.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_tensorboard_files_are_written(tmp_path):
    pytest.importorskip("tensorboardX")
    writer = MetricWriter(tmp_path, tensorboard=True)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert list(tmp_path.glob("events.out.tfevents.*"))


def progress(monkeypatch, **options):
    """Ten steps of 8 images and 4 TFLOP each in 2 seconds."""
    clock = iter((0.0, 2.0))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock, 2.0))
    progress = Progress(20, 8, **options)
    progress.restart(0)
    for step in range(0, 11):  # step 0 lies before what is measured
        progress.add(step, 4e12)
    return progress.measure(10)


def test_rates_of_a_known_accelerator(monkeypatch, caplog):
    rates = progress(monkeypatch, chips=4, peak_flops=50e12)
    assert rates == pytest.approx(
        {"steps_per_s": 5, "images_per_s": 40, "images_per_s_per_chip": 10, "tflops_per_s_per_chip": 5, "mfu": 0.1,
         "eta_s": 2}
    )  # fmt: skip
    with caplog.at_level("INFO"):
        log_progress(10, 20, {"loss": 1.0, "learning_rate": 1e-4, "grad_norm": 1.0}, rates)
    assert "5 steps/s, 40 images/s (10 per chip), MFU 10.0%, 2 s left" in caplog.text


def test_rates_of_an_unknown_device(monkeypatch, caplog):
    rates = progress(monkeypatch)
    assert "mfu" not in rates and rates["tflops_per_s_per_chip"] == pytest.approx(20)
    with caplog.at_level("INFO"):
        log_progress(10, 20, {"loss": 1.0, "learning_rate": 1e-4, "grad_norm": 1.0}, rates)
    assert "40 images/s, 20 TFLOP/s, 2 s left" in caplog.text


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("TPU v4 lite", None),
        ("cpu", None),
    ],
)
def test_peaks(kind, teraflops):
    assert peak_flops(SimpleNamespace(device_kind=kind)) == (teraflops and teraflops * 1e12)


def test_turns_of_a_scan_count_each():
    weights, x = jnp.ones((5, 8, 8)), jnp.ones((3, 8))

    def scanned(weights, x):
        return jax.lax.scan(lambda x, weight: (jnp.tanh(x @ weight), None), x, weights)[0].sum()

    assert count_flops(jax.make_jaxpr(scanned)(weights, x)) == 5 * 2 * 3 * 8 * 8
    assert count_flops(jax.make_jaxpr(jax.grad(scanned, (0, 1)))(weights, x)) == 3 * 5 * 2 * 3 * 8 * 8


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 4)])
def test_convolutions_and_their_gradients(stride, groups):
    """Forward pass, gradient of the input and gradient of the kernel cost the same."""
    image, kernel = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4 // groups, 8))

    def conv(image, kernel):
        return jax.lax.conv_general_dilated(
            image, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        ).sum()  # fmt: skip

    once = 2 * 2 * (8 // stride) ** 2 * 8 * 9 * (4 // groups)
    assert count_flops(jax.make_jaxpr(conv)(image, kernel)) == once
    assert count_flops(jax.make_jaxpr(jax.grad(conv, (0, 1)))(image, kernel)) == pytest.approx(3 * once)


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"devices": 4, "model": 2}], ids=str)
def test_a_step_costs_the_same_however_it_is_split(make_step, options):
    """Three matrices for 8 images: forward, gradient of the weights, and of the inputs but for the first; the norm."""
    step = make_step(**options)
    batch = put_batch(toy.toy_batch(0), step.mesh)
    forward = 2 * 8 * (8 * 16 + 16 * 16 + 16 * 4)
    norm = 2 * sum(weight.size for weight in step.model.params.values())
    assert step.flops(step.abstract_state, batch) == 3 * forward - 2 * 8 * 8 * 16 + norm
