"""From official files to numbers: one function per metric of single images.

Each takes paths, scores every image of the ground truth (images without a prediction count as empty) and returns the
metric's result dictionary. The streaming classes behind them take numpy and know no files.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from esg_jax.evaluation import formats, panoptic
from esg_jax.evaluation.average_precision import AveragePrecision, EntityAP
from esg_jax.evaluation.best_overlap import BestOverlap
from esg_jax.evaluation.consistency import AnnotatorConsistency
from esg_jax.evaluation.dis import DichotomousMeasures
from esg_jax.evaluation.driver import accumulate
from esg_jax.evaluation.lvis import LvisAP
from esg_jax.evaluation.panoptic import PanopticQuality
from esg_jax.evaluation.rle import EvaluationError
from esg_jax.evaluation.semantic import SemanticIoU
from esg_jax.evaluation.statistics import AnnotationStatistics

Paths = str | Path | Sequence[str | Path]


def coco_items(gt: formats.CocoAnnotations, results: dict[Any, list[dict[str, Any]]]) -> list[tuple]:
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
    annotations = formats.CocoAnnotations.load(gt)
    metric = AveragePrecision(
        kind, class_agnostic=class_agnostic, categories=annotations.category_ids() or None, box_areas=box_areas
    )
    return _instances(metric, annotations, pred, workers, f"{kind} AP")


def statistics(gt: str | Path, *, workers: int = 1) -> AnnotationStatistics:
    """Statistics of a COCO ground-truth file."""
    annotations = formats.CocoAnnotations.load(gt)
    items = []
    for uid in annotations.units:
        if annotations.size(uid) is None:
            raise EvaluationError(f"{gt}: image {uid} has no height and width")
        items.append((uid, annotations.annotations[uid], annotations.size(uid)))
    return accumulate(AnnotationStatistics(), items, add_instances, workers=workers, description="statistics")


def consistency(gt: str | Path, pred: str | Path, *, workers: int = 1) -> AnnotatorConsistency:
    """Annotator `pred` against annotator `gt`; both are COCO ground-truth files of the same images."""
    one, other = (formats.CocoAnnotations.load(path) for path in (gt, pred))
    if set(one.units) != set(other.units):
        strange = sorted(set(one.units) ^ set(other.units), key=str)
        raise EvaluationError(f"image_id {strange[0]} is in only one of {gt} and {pred} ({len(strange)} such images)")
    items = [(uid, other.annotations[uid], one.annotations[uid], one.size(uid)) for uid in one.units]
    return accumulate(AnnotatorConsistency(), items, add_instances, workers=workers, description="consistency")


def best_overlap(gt: str | Path, pred: Paths, *, workers: int = 1) -> BestOverlap:
    """Mean best IoU and recall at 0.5 of the annotated entities."""
    return _instances(BestOverlap(), gt, pred, workers, "best overlap")


def _instances(metric, gt, pred: Paths, workers: int, description: str):
    annotations = gt if isinstance(gt, formats.CocoAnnotations) else formats.CocoAnnotations.load(gt)
    results = formats.load_results(pred, annotations.units)
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
    annotations = formats.CocoAnnotations.load(gt)
    results = formats.load_results(pred, annotations.units)
    items = []
    for uid, image in annotations.units.items():
        rest = {
            "negative": formats.field(image, "neg_category_ids", f"{gt}, image {uid}"),
            "not_exhaustive": formats.field(image, "not_exhaustive_category_ids", f"{gt}, image {uid}"),
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


def panoptic_quality(
    gt: str | Path,
    pred: Paths,
    *,
    gt_dir: str | Path | None = None,
    pred_dir: str | Path | None = None,
    only: Sequence[Any] | None = None,
    workers: int = 1,
) -> PanopticQuality:
    """PQ of COCO panoptic JSON against another.

    Args:
        gt, pred: the JSON files; predictions may come in several, one per host.
        gt_dir, pred_dir: folders of the PNGs; default: the folder beside the (first) JSON that has its name.
        only: image ids to score; default: all of `gt`, each of which needs a prediction.
    """
    annotations = formats.CocoAnnotations.load(gt)
    paths = [pred] if isinstance(pred, (str, Path)) else list(pred)
    by_image: dict[Any, dict[str, Any]] = {}
    for path in paths:
        for record in formats.field(formats.load_json(path), "annotations", str(path)):
            uid = formats.field(record, "image_id", f"{path}, annotations")
            if uid in by_image:
                raise EvaluationError(f"{path}: image_id {uid} has two predictions")
            by_image[uid] = record
    names = ", ".join(map(str, paths))
    unknown = sorted(set(by_image) - set(annotations.units), key=str)
    if unknown:
        raise EvaluationError(f"{names}: image_id {unknown[0]} ({len(unknown)} in all) is not in {gt}; another split?")
    gt_dir, pred_dir = (Path(d) if d else Path(p).with_suffix("") for d, p in ((gt_dir, gt), (pred_dir, paths[0])))
    items = []
    for uid in annotations.units if only is None else only:
        for record in annotations.annotations[uid]:
            if uid not in by_image:
                raise EvaluationError(f"{names}: image_id {uid} has no prediction; every image needs one")
            items.append((uid, pred_dir, by_image[uid], gt_dir, record))
    return accumulate(PanopticQuality(annotations.categories), items, _add_panoptic, workers=workers, description="PQ")


def _add_panoptic(metric: PanopticQuality, item: tuple) -> None:
    uid, pred_dir, pred, gt_dir, gt = item
    files = [
        Path(folder) / formats.field(r, "file_name", f"image {uid}") for folder, r in ((pred_dir, pred), (gt_dir, gt))
    ]
    maps = [panoptic.ids_from_rgb(formats.read_image(file, "RGB")) for file in files]
    metric.add(uid, (maps[0], pred["segments_info"]), (maps[1], gt["segments_info"]))


def semantic_iou(
    gt: str | Path,
    pred: str | Path,
    *,
    num_classes: int,
    ignore_label: int = 255,
    boundary: bool = False,
    workers: int = 1,
) -> SemanticIoU:
    """mIoU of the label-map PNGs in folder `pred` against those of the same names in `gt`."""
    pairs = paired_files(gt, pred)
    metric = SemanticIoU(num_classes, ignore_label=ignore_label, boundary=boundary)
    return accumulate(metric, pairs, add_label_map, workers=workers, description="mIoU")


def add_label_map(metric: SemanticIoU, pair: tuple[str, Path, Path]) -> None:
    name, gt, pred = pair
    metric.add(name, _label_map(pred), _label_map(gt))


def _label_map(path: Path):
    image = formats.read_image(path)
    if image.ndim != 2:
        raise EvaluationError(f"{path}: a label map has one channel (greyscale or palette), got shape {image.shape}")
    return image


def dichotomous(
    gt: str | Path, pred: str | Path, *, correction_effort: bool = True, workers: int = 1
) -> DichotomousMeasures:
    """DIS measures of the grey PNGs in folder `pred` against those of the same names in `gt`."""
    pairs = paired_files(gt, pred)
    metric = DichotomousMeasures(correction_effort=correction_effort)
    return accumulate(metric, pairs, _add_grey, workers=workers, description="DIS measures")


def _add_grey(metric: DichotomousMeasures, pair: tuple[str, Path, Path]) -> None:
    name, gt, pred = pair
    metric.add(name, formats.read_image(pred, "L"), formats.read_image(gt, "L"))


def paired_files(gt: str | Path, pred: str | Path, suffixes: Sequence[str] = (".png",)) -> list[tuple[str, Path, Path]]:
    """(name, ground truth, prediction) of every file in folder `gt`; both folders must hold the same names.

    Raises:
        EvaluationError: an empty or missing folder, or names that only one folder has.
    """
    listing = functools.partial(_listing, suffixes=suffixes)
    targets, preds = listing(gt), listing(pred)
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
