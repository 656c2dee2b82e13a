"""docs/extending.md, "How to add an evaluation task": the code of the page works without editing the package."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REPO = Path(__file__).resolve().parents[2]


SECTION = "How to add an evaluation task"


def code_of(section):
    """The Python code of a section of the page."""
    page = (REPO / "docs" / "extending.md").read_text()
    (text,) = re.findall(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", page, re.M | re.S)
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    return code


def run(script, *arguments):
    """A script of the repository, in a process that has seen no toy before."""
    command = [sys.executable, str(REPO / script), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    return subprocess.run(command, capture_output=True, text=True, cwd=REPO, env=environment, check=False)


@pytest.fixture
def photographs(tmp_path):
    """Two grey pictures that are as bright as annotated, and weights that double it."""
    for name, value in (("a.png", 51), ("b.png", 102)):
        Image.fromarray(np.full((20, 30, 3), value, np.uint8)).save(tmp_path / name)
    (tmp_path / "brightness.json").write_text(json.dumps({"a.png": 0.2, "b.png": 0.4}))
    (tmp_path / "weights.json").write_text(json.dumps({"factor": 2}))
    return tmp_path


def test_an_evaluation_task(photographs, tmp_path):
    (tmp_path / "brightness.py").write_text(code_of(SECTION))
    recipe = f"--config={tmp_path}/brightness.py:{photographs}"
    first = run("eval.py", recipe, f"--checkpoint={photographs}/weights.json", f"--out={tmp_path}/first")
    assert first.returncode == 0, first.stderr
    results = json.loads((tmp_path / "first" / "results.json").read_text())
    assert results["metrics"] == {"MAE": pytest.approx(0.3)} and results["config"]["type"] == "BrightnessTask"
    assert "30.00" in first.stdout and Image.open(tmp_path / "first" / "grid.png").size[0] > 800
    # The saved answers score again, in any number of files; fields are overridden like those of every recipe.
    answers = json.loads((tmp_path / "first" / "predictions.json").read_text())
    for name, value in answers.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({name: value}))
    files = ",".join(f"{tmp_path}/{name}.json" for name in answers)
    again = run("eval.py", recipe, f"--predictions={files}", f"--out={tmp_path}/again")
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "again" / "results.json").read_text())["metrics"] == results["metrics"]
    more = ("--config.offset=0.1", "--config.max_images=1", "--config.grid_images=0")
    other = run("eval.py", recipe, *more, f"--checkpoint={photographs}/weights.json", f"--out={tmp_path}/other")
    assert json.loads((tmp_path / "other" / "results.json").read_text())["metrics"] == {"MAE": pytest.approx(0.3)}
    assert not (tmp_path / "other" / "grid.png").exists(), other.stderr


def test_a_task_that_nobody_added(tmp_path):
    (tmp_path / "recipe.py").write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'type': 'NoTask'})\n"
    )
    refused = run("eval.py", f"--config={tmp_path}/recipe.py", f"--out={tmp_path}")
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert "config.type is 'NoTask'; choose one of EntityTask, " in refused.stderr
