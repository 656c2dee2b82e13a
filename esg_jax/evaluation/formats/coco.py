"""Files of the COCO family (also LVIS, referring comprehension), and the metrics that score them.

The functions that return a metric score every image of the ground truth; images without a prediction count as empty.
"""

import collections
import dataclasses
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from esg_jax.evaluation.formats.files import field, load_json
from esg_jax.evaluation.metrics.errors import EvaluationError
from esg_jax.evaluation.metrics.grounding.referring_comprehension import ReferringComprehension
from esg_jax.evaluation.metrics.images.annotation_statistics import AnnotationStatistics
from esg_jax.evaluation.metrics.images.average_precision import AveragePrecision, EntityAP
from esg_jax.evaluation.metrics.images.best_overlap import BestOverlap
from esg_jax.evaluation.metrics.images.consistency import AnnotatorConsistency
from esg_jax.evaluation.metrics.images.lvis import LvisAP
from esg_jax.evaluation.workers import accumulate

Paths = str | Path | Sequence[str | Path]


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


def coco_items(gt: CocoAnnotations, results: dict[Any, list[dict[str, Any]]]) -> list[tuple]:
    """(image id, predictions, annotations, size) of every image."""
    return [(uid, results[uid], gt.annotations[uid], gt.size(uid)) for uid in gt.units]


def add_instances(metric, item: tuple) -> None:
    """Module level, so that worker processes can import it."""
    metric.add(*item)


def entity_ap(gt: str | Path, pred: Paths, *, workers: int = 1) -> EntityAP:
    """AP^e of COCO results `pred` on the COCO ground truth `gt`."""
    return _instances(EntityAP(), gt, pred, workers, "AP^e")


def coco_ap(
    gt: str | Path,
    pred: Paths,
    *,
    kind: str = "segm",
    class_agnostic: bool = False,
    box_areas: bool = False,
    workers: int = 1,
) -> AveragePrecision:
    """Mask ("segm"), box ("bbox") or "boundary" AP."""
    annotations = CocoAnnotations.load(gt)
    metric = AveragePrecision(
        kind, class_agnostic=class_agnostic, categories=annotations.category_ids() or None, box_areas=box_areas
    )
    return _instances(metric, annotations, pred, workers, f"{kind} AP")


def statistics(gt: str | Path, *, workers: int = 1) -> AnnotationStatistics:
    """Statistics of a COCO ground-truth file."""
    annotations = CocoAnnotations.load(gt)
    items = []
    for uid in annotations.units:
        if annotations.size(uid) is None:
            raise EvaluationError(f"{gt}: image {uid} has no height and width")
        items.append((uid, annotations.annotations[uid], annotations.size(uid)))
    return accumulate(AnnotationStatistics(), items, add_instances, workers=workers, description="statistics")


def consistency(gt: str | Path, pred: str | Path, *, workers: int = 1) -> AnnotatorConsistency:
    """Annotator `pred` against annotator `gt`; both are COCO ground-truth files of the same images."""
    one, other = (CocoAnnotations.load(path) for path in (gt, pred))
    if set(one.units) != set(other.units):
        strange = sorted(set(one.units) ^ set(other.units), key=str)
        raise EvaluationError(f"image_id {strange[0]} is in only one of {gt} and {pred} ({len(strange)} such images)")
    items = [(uid, other.annotations[uid], one.annotations[uid], one.size(uid)) for uid in one.units]
    return accumulate(AnnotatorConsistency(), items, add_instances, workers=workers, description="consistency")


def best_overlap(gt: str | Path, pred: Paths, *, workers: int = 1) -> BestOverlap:
    """Mean best IoU and recall at 0.5 of the annotated entities."""
    return _instances(BestOverlap(), gt, pred, workers, "best overlap")


def _instances(metric, gt, pred: Paths, workers: int, description: str):
    annotations = gt if isinstance(gt, CocoAnnotations) else CocoAnnotations.load(gt)
    results = load_results(pred, annotations.units)
    return accumulate(metric, coco_items(annotations, results), add_instances, workers=workers, description=description)


def lvis_ap(
    gt: str | Path,
    pred: Paths,
    *,
    kind: str = "segm",
    max_dets: int = 300,
    top_per_class: int | None = None,
    workers: int = 1,
) -> LvisAP:
    """LVIS AP; `top_per_class` (10000 in papers) gives "AP fixed" and lifts the limit per image."""
    annotations = CocoAnnotations.load(gt)
    results = load_results(pred, annotations.units)
    items = []
    for uid, image in annotations.units.items():
        rest = {
            "negative": field(image, "neg_category_ids", f"{gt}, image {uid}"),
            "not_exhaustive": field(image, "not_exhaustive_category_ids", f"{gt}, image {uid}"),
            "positions": [record["_position"] for record in results[uid]],
        }
        items.append((uid, results[uid], annotations.annotations[uid], annotations.size(uid), rest))
    metric = LvisAP(
        annotations.categories,
        kind=kind,
        max_dets=-1 if top_per_class else max_dets,
        top_per_class=top_per_class,
    )
    return accumulate(metric, items, _add_lvis, workers=workers, description="LVIS AP")


def _add_lvis(metric: LvisAP, item: tuple) -> None:
    *positional, keywords = item
    metric.add(*positional, **keywords)


def referring_comprehension(
    gt: str | Path, pred: str | Path | Sequence[str | Path], *, kind: str = "bbox", workers: int = 1
) -> ReferringComprehension:
    """P@0.5 of boxes or masks; COCO files, one image record and one annotation per expression."""
    return _instances(ReferringComprehension(kind), gt, pred, workers, "P@0.5")
