"""`benchmarks/gpu.py`: every stage is reported, whatever becomes of it; a dry run needs no GPU."""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses looks for names
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def stages():
    yield load("stages")
    del sys.modules["stages"]


@pytest.fixture(scope="module")
def gpu(stages):
    yield load("gpu")  # imports the stages by that name
    del sys.modules["gpu"]


def python(code: str) -> list:
    return [[sys.executable, "-c", code]]


def run(stages, folder, *todo, seconds=60.0):
    report = stages.Report(folder / "out", 1, dry_run=True)
    runner = stages.Runner(report, folder, folder)
    for stage in todo:
        runner.run(stage, seconds, {})
    return json.loads((folder / "out" / "report.json").read_text())["stages"]


def test_every_outcome_is_reported_and_the_next_stage_runs(stages, tmp_path):
    table = "import json; json.dump([1, 2], open('table.json', 'w')); print('| a |'); print('| --- |'); print('| 7 |')"

    def unreadable():
        yield from python("print('one')")
        raise ValueError("what it left cannot be read")

    results = run(
        stages,
        tmp_path,
        stages.Stage("fails", "F", 1, lambda: python("import sys; print('shown'); sys.exit('the reason')")),
        stages.Stage("raises", "R", 1, unreadable),
        stages.Stage("refuses", "N", 1, lambda: python("1/0"), lambda: "there is no GPU"),
        stages.Stage("table", "T", 1, lambda: python(table), shows="all"),
        stages.Stage("second", "S", 1, lambda: [*python("raise SystemExit(4)"), *python("print('never')")]),
    )
    assert {name: stage["result"] for name, stage in results.items()} == {
        "fails": "failed, exit status 1",
        "raises": "failed, ValueError: what it left cannot be read",
        "refuses": "not run: there is no GPU",
        "table": "passed",
        "second": "failed, exit status 4",
    }
    assert "the reason" in results["fails"]["shown"] and results["table"]["rows"] == [1, 2]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "\n| a |\n| --- |\n| 7 |\n" in text and "| refuses | N | not run: there is no GPU |" in text
    assert "Dry run" in text and "the reason" in text and "never" not in (tmp_path / "out" / "log.txt").read_text()


def test_time_limits(stages, tmp_path, monkeypatch):
    """A stage that is asked to stop may still save; one that does not listen is killed, and its children with it."""
    monkeypatch.setattr(stages, "LEAST_SECONDS", 1)
    saves = "import signal, sys, time, pathlib\n"
    saves += "def stop(*_):\n    pathlib.Path('saved').touch()\n    sys.exit(0)\n"
    saves += "signal.signal(signal.SIGTERM, stop)\ntime.sleep(60)"
    deaf = "import signal, subprocess, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    deaf += "child = 'import time, pathlib; time.sleep(6); pathlib.Path(\"lives\").touch()'\n"
    deaf += "subprocess.Popen([sys.executable, '-c', child])\ntime.sleep(60)"
    start = time.monotonic()
    results = run(
        stages,
        tmp_path,
        stages.Stage("saves", "S", 0.03, lambda: python(saves), grace=30),
        stages.Stage("deaf", "D", 0.03, lambda: python(deaf), grace=1),
    )
    assert [stage["result"] for stage in results.values()] == ["timed out", "timed out"]
    assert time.monotonic() - start < 30
    time.sleep(max(0.0, 9 - (time.monotonic() - start)))
    assert (tmp_path / "saved").exists() and not (tmp_path / "lives").exists()
    assert run(stages, tmp_path, stages.Stage("late", "L", 1, lambda: python("")), seconds=0.5)["late"]["result"] == (
        "not run: no time left"
    )


def test_a_later_call_keeps_the_other_stages(stages, tmp_path):
    run(stages, tmp_path, stages.Stage("first", "F", 1, lambda: python("")))
    results = run(stages, tmp_path, stages.Stage("second", "S", 1, lambda: python("raise SystemExit(1)")))
    assert [stage["result"] for stage in results.values()] == ["passed", "failed, exit status 1"]


def test_schedule_of_training_ends_with_the_time(gpu, tmp_path, monkeypatch):
    """100 steps give rate and overhead; the rest of the time, less the overhead, gives the number of steps."""
    now = [1000.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    options = dict(out=tmp_path / "out", work=tmp_path, minutes=10, dry_run=False, data=Path(__file__), validation=None)
    run = gpu.Run(argparse.Namespace(**options, wheels=None, train_share=0.4, train_options=["--config.seed=3"]))
    assert run.no_training() is None

    def trained(step, seconds, **facts):
        now[0] += seconds
        (tmp_path / "train").mkdir(exist_ok=True)
        with open(tmp_path / "train" / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, "loss": 1.0, **facts}) + "\n")

    commands = run.train_commands()
    first = next(commands)
    assert "--config.loop.total_steps=100" in first and "--config.seed=3" in first
    trained(100, 80, steps_per_s=5.0)  # of which the steps took 20 s
    second = next(commands)
    assert "--config.loop.total_steps=2250" in second  # 100 + 5 * (600 - 80 - 30 - 60)
    assert "--config.loop.max_minutes=8.17" in second and "--config.optim.schedule=constant" not in second
    trained(2250, 500, steps_per_s=5.0)
    assert list(commands) == [] and run.report.content["training"]["step"] == 2250

    now[0], run.deadline = 5000.0, 5300.0  # another call goes on
    (again,) = run.train_commands()
    assert f"--config.loop.total_steps={2250 + 5 * (300 - 30 - 90)}" in again

    assert run.left() == 300
    run.pending.add("train")
    assert run.left() == 300 - 0.4 * 600  # for a stage before training


def script(folder, *arguments):
    command = [sys.executable, BENCHMARKS / "gpu.py", "--out", folder, *arguments]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=folder)


def test_wrong_arguments(tmp_path):
    assert "none.arrayrecord does not exist" in script(tmp_path, "--data", "none.arrayrecord").stderr
    assert "unrecognized arguments: --bake" in script(tmp_path, "--bake").stderr
    result = script(tmp_path, "--dry-run", "--stages", "bake")
    assert result.returncode == 2 and "unknown stage bake; choose from build" in result.stderr


@pytest.mark.slow
def test_without_a_gpu_it_says_so(tmp_path):
    result = script(tmp_path, "--stages", "attention")
    assert result.returncode == 1 and "sees no GPU, only cpu" in result.stderr and "--dry-run" in result.stderr


@pytest.mark.slow
def test_dry_run(tmp_path):
    """Tables and a training that cannot work; what a GPU is needed for says so."""
    bad = ["--config.optim.schedule=circular"]
    result = script(
        tmp_path, "--dry-run", "--stages", "attention", "mosaic", "memcheck", "train", "evaluate", "--minutes", 30, *bad
    )
    assert result.returncode == 0, result.stderr
    stages = json.loads((tmp_path / "report.json").read_text())["stages"]
    assert {name: stage["result"] for name, stage in stages.items()} == {
        "machine": "passed",
        "attention": "passed",
        "mosaic": "not run: needs a GPU",
        "memcheck": "not run: needs a GPU",
        "train": "failed, exit status 1",
        "evaluate": "not run: there are no trained weights",
    }
    names = [row["implementation"] for row in stages["attention"]["rows"][0]["rows"]]
    assert names[:2] == ["corner gather", "xla"]
    assert any("schedule is 'circular'" in line for line in stages["train"]["shown"])
