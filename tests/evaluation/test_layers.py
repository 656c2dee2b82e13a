"""Scoring knows no model: anybody's predictions can be scored."""

import ast
from pathlib import Path

import esg_jax.evaluation

# Runs a model for eval.py; nothing that scores may import it.
RUNS_MODELS = "grounding_predictions"


def test_scoring_imports_no_model():
    files = sorted(Path(esg_jax.evaluation.__file__).parent.glob("*.py"))
    assert len(files) > 10
    for file in files:
        if file.stem == RUNS_MODELS:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                known = name.startswith(("esg_jax.inference", "esg_jax.models", "esg_jax.train", "esg_jax.interop"))
                assert not known and RUNS_MODELS not in name, f"{file.name} imports {name}"
