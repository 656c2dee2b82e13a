"""Scoring knows no model: anybody's predictions can be scored, without JAX."""

import ast
import subprocess
import sys
from pathlib import Path

import esg_jax.evaluation

ROOT = Path(esg_jax.evaluation.__file__).parent
SHARED = ("accumulator", "averages", "boundary", "errors", "greedy_matching", "instances", "paired_masks")


def imports(file):
    """Our modules that a file imports, with the names it takes from them."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_metrics_import_masks_and_one_another_alone():
    """Besides what all share, a metric may build on another, as consistency does on AP."""
    files = sorted((ROOT / "metrics").rglob("*.py"))
    assert len(files) > 20
    shared = tuple(f"esg_jax.evaluation.metrics.{name}" for name in (*SHARED, "images", "grounding", "video"))
    for file in files:
        for name in imports(file):
            assert not name.startswith("esg_jax") or name.startswith(("esg_jax.masks", *shared)), f"{file}: {name}"
            assert not name.startswith(("jax.", "flax")) and name not in ("jax", "flax"), f"{file}: {name}"


def test_masks_import_nothing_of_ours():
    import esg_jax.masks

    for file in Path(esg_jax.masks.__file__).parent.glob("*.py"):
        for name in imports(file):
            assert not name.startswith("esg_jax") or name.startswith("esg_jax.masks"), f"{file}: {name}"


def test_only_tasks_and_main_run_models():
    for file in sorted(ROOT.rglob("*.py")):
        if file.name in ("main.py", "__main__.py") or file.parent.name == "tasks":
            continue
        for name in imports(file):
            assert not name.startswith(
                ("esg_jax.inference", "esg_jax.models", "esg_jax.train", "esg_jax.interop", "esg_jax.evaluation.tasks")
            ), f"{file}: {name}"


def test_scoring_loads_no_jax():
    code = "import sys, esg_jax.cli.evaluate; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
