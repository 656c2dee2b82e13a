"""JSON files, images and folders of images; every problem is an `EvaluationError` that names the file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from esg_jax.evaluation.metrics.errors import EvaluationError


def load_json(path: str | Path) -> Any:
    """Parsed JSON file."""
    path = Path(path)
    if not path.is_file():
        raise EvaluationError(f"no such file: {path}")
    text = path.read_text()
    if not text.strip():
        raise EvaluationError(f"{path} is empty; a results file without predictions is the JSON list []")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{path} is not valid JSON: {error}") from error


def field(record: Mapping[str, Any], name: str, where: str) -> Any:
    """`record[name]` or an error that says where it is missing."""
    if not isinstance(record, Mapping) or name not in record:
        raise EvaluationError(f"{where}: field {name!r} is missing")
    return record[name]


def read_image(path: str | Path, mode: str | None = None) -> np.ndarray:
    """Pixels of an image file, optionally converted to PIL `mode`."""
    try:
        with Image.open(path) as image:
            return np.array(image.convert(mode) if mode and image.mode != mode else image)
    except FileNotFoundError:
        raise EvaluationError(f"no such file: {path}") from None
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read as an image: {error}") from error


def paired_files(gt: str | Path, pred: str | Path, suffixes: Sequence[str] = (".png",)) -> list[tuple[str, Path, Path]]:
    """(name, ground truth, prediction) of every file in folder `gt`; both folders must hold the same names.

    Raises:
        EvaluationError: an empty or missing folder, or names that only one folder has.
    """
    targets, preds = (_listing(folder, suffixes) for folder in (gt, pred))
    if set(targets) != set(preds):
        missing, strange = sorted(set(targets) - set(preds)), sorted(set(preds) - set(targets))
        what = f"{missing[0]} has no prediction" if missing else f"{strange[0]} is not in the ground truth"
        raise EvaluationError(f"{pred}: {what} ({len(missing)} missing, {len(strange)} unknown); another split?")
    return [(name, targets[name], preds[name]) for name in sorted(targets)]


def _listing(folder: str | Path, suffixes: Sequence[str]) -> dict[str, Path]:
    folder = Path(folder)
    if not folder.is_dir():
        raise EvaluationError(f"no such folder: {folder}")
    found = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.suffix.lower() in suffixes}
    if not found:
        raise EvaluationError(f"{folder} holds no {' / '.join(suffixes)} files")
    return found
