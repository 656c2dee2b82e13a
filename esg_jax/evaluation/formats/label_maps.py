"""PNGs of panoptic, semantic and dichotomous segmentation, and the metrics that score them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from esg_jax.evaluation.formats.coco import CocoAnnotations, Paths
from esg_jax.evaluation.formats.files import field, load_json, paired_files, read_image
from esg_jax.evaluation.metrics.errors import EvaluationError
from esg_jax.evaluation.metrics.images.dichotomous import DichotomousMeasures
from esg_jax.evaluation.metrics.images.mean_iou import SemanticIoU
from esg_jax.evaluation.metrics.images.panoptic_quality import PanopticQuality
from esg_jax.evaluation.workers import accumulate
from esg_jax.masks.read import ids_from_rgb


def panoptic_quality(
    gt: str | Path | CocoAnnotations,
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
    annotations = gt if isinstance(gt, CocoAnnotations) else CocoAnnotations.load(gt)
    gt = annotations.path
    paths = [pred] if isinstance(pred, (str, Path)) else list(pred)
    by_image: dict[Any, dict[str, Any]] = {}
    for path in paths:
        for record in field(load_json(path), "annotations", str(path)):
            uid = field(record, "image_id", f"{path}, annotations")
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
    files = [Path(folder) / field(r, "file_name", f"image {uid}") for folder, r in ((pred_dir, pred), (gt_dir, gt))]
    maps = [ids_from_rgb(read_image(file, "RGB")) for file in files]
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
    image = read_image(path)
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
    metric.add(name, read_image(pred, "L"), read_image(gt, "L"))
