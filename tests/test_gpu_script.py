"""`benchmarks/gpu.py`: every stage is reported, whatever becomes of it; a dry run needs no GPU."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def stages():
    spec = importlib.util.spec_from_file_location("stages", BENCHMARKS / "stages.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses looks for its names
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


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


def script(folder, *arguments):
    command = [sys.executable, BENCHMARKS / "gpu.py", "--out", folder, *arguments]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=folder)


def test_wrong_arguments(tmp_path):
    assert "none.arrayrecord does not exist" in script(tmp_path, "--data", "none.arrayrecord").stderr
    result = script(tmp_path, "--dry-run", "--stages", "bake")
    assert result.returncode == 2 and "unknown stage bake; choose from build" in result.stderr


@pytest.mark.slow
def test_without_a_gpu_it_says_so(tmp_path):
    result = script(tmp_path, "--stages", "attention")
    assert result.returncode == 1 and "sees no GPU, only cpu" in result.stderr and "--dry-run" in result.stderr


@pytest.mark.slow
def test_dry_run(tmp_path):
    """Tables and a training that cannot work; what a GPU is needed for says so."""
    bad = ["--train-options", "--config.optim.schedule=circular"]
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
