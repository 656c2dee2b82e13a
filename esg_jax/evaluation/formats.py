"""Readers of the official file formats; every problem is an `EvaluationError` with file and id."""

import collections
import dataclasses
import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from esg_jax.evaluation.rle import EvaluationError


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


@dataclasses.dataclass(frozen=True)
class CocoAnnotations:
    """A COCO-style ground-truth file: `units` are its images or videos, by id; annotations grouped by unit id."""

    path: Path
    units: dict[Any, dict[str, Any]]
    annotations: dict[Any, list[dict[str, Any]]]
    categories: list[dict[str, Any]]
    raw: dict[str, Any]

    @classmethod
    def load(cls, path: str | Path, *, units: str = "images", key: str = "image_id") -> "CocoAnnotations":
        """Reads `path`; `units` / `key` are "videos" / "video_id" for the video formats."""
        path = Path(path)
        raw = load_json(path)
        if not isinstance(raw, dict) or not raw.get(units):
            raise EvaluationError(f"{path}: not a ground-truth file, it has no {units!r}")
        by_id: dict[Any, dict[str, Any]] = {}
        for unit in raw[units]:
            uid = field(unit, "id", f"{path}, {units}")
            if uid in by_id:
                raise EvaluationError(f"{path}: {key} {uid} is listed twice")
            by_id[uid] = unit
        grouped: dict[Any, list[dict[str, Any]]] = {uid: [] for uid in by_id}
        for annotation in raw.get("annotations") or []:
            uid = field(annotation, key, f"{path}, annotation {annotation.get('id')}")
            if uid not in grouped:
                raise EvaluationError(f"{path}: annotation {annotation.get('id')} names unknown {key} {uid}")
            grouped[uid].append(annotation)
        return cls(path, by_id, grouped, raw.get("categories") or [], raw)

    def size(self, unit_id: Any) -> tuple[int, int] | None:
        """(height, width), or None when the file does not say."""
        unit = self.units[unit_id]
        return (int(unit["height"]), int(unit["width"])) if "height" in unit and "width" in unit else None

    def category_ids(self) -> list[int]:
        """Ids of the categories listed."""
        return [int(field(c, "id", f"{self.path}, categories")) for c in self.categories]


def load_results(
    paths: str | Path | Sequence[str | Path], known: Iterable[Any], *, key: str = "image_id", needs_score: bool = True
) -> dict[Any, list[dict[str, Any]]]:
    """COCO results of one or more files (one per host), grouped by image in file order (`_position` in each).

    Args:
        paths: JSON lists of records.
        known: ids of the ground truth; every one appears in the output.
        key: "image_id" or "video_id".
        needs_score: refuse records whose `score` is missing or not finite.

    Raises:
        EvaluationError: an id that the ground truth lacks (predictions of another split), a missing or NaN score.
    """
    grouped: dict[Any, list[dict[str, Any]]] = {uid: [] for uid in known}
    unknown: dict[Any, int] = collections.Counter()
    total = 0
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    for path in paths:
        records = load_json(path)
        if isinstance(records, Mapping) and "annotations" in records:
            records = records["annotations"]
        if not isinstance(records, list):
            raise EvaluationError(f"{path}: results must be a JSON list of records")
        for i, record in enumerate(records):
            uid = field(record, key, f"{path}, record {i}")
            if uid not in grouped:
                unknown[uid] += 1
                continue
            if needs_score:
                score = field(record, "score", f"{path}, record {i} ({key} {uid})")
                if not isinstance(score, (int, float)) or not math.isfinite(score):
                    raise EvaluationError(f"{path}, record {i} ({key} {uid}): score is {score!r}, not a finite number")
            grouped[uid].append({**record, "_position": total})
            total += 1
    names = ", ".join(map(str, paths))
    if unknown:
        shown = ", ".join(str(uid) for uid in list(unknown)[:5])
        raise EvaluationError(
            f"{names}: {sum(unknown.values())} predictions name {len(unknown)} {key}s that the ground truth lacks "
            f"({shown}{', ...' if len(unknown) > 5 else ''}); is this another split?"
        )
    if not total:
        warnings.warn(f"{names}: no predictions", stacklevel=2)
    _warn_duplicates(grouped, key)
    return grouped


def _warn_duplicates(grouped: Mapping[Any, Sequence[Mapping[str, Any]]], key: str) -> None:
    """Exact repetitions count as further detections in the official tools, so here too; but nobody means them."""
    for uid, records in grouped.items():
        seen = set()
        for record in records:
            what = record.get("segmentation", record.get("bbox", record.get("segmentations")))
            if isinstance(what, Mapping):
                what = what.get("counts")
            identity = (record.get("category_id"), record.get("score"), str(what))
            # Models may return many empty masks of score 0; that is no mistake.
            if identity in seen and record.get("score") != 0:
                warnings.warn(f"{key} {uid} has the same prediction twice; it counts twice", stacklevel=3)
                return
            seen.add(identity)


def read_image(path: str | Path, mode: str | None = None) -> np.ndarray:
    """Pixels of an image file, optionally converted to PIL `mode`."""
    try:
        with Image.open(path) as image:
            return np.array(image.convert(mode) if mode and image.mode != mode else image)
    except FileNotFoundError:
        raise EvaluationError(f"no such file: {path}") from None
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read as an image: {error}") from error
