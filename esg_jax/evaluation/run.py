"""Scores saved predictions as an `EvalConfig` asks, and draws them; what `eval.py` does after predicting."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from esg_jax.evaluation import formats, rle, tasks, text_sets
from esg_jax.evaluation.accumulator import Accumulator
from esg_jax.evaluation.average_precision import AveragePrecision, EntityAP
from esg_jax.evaluation.best_overlap import BestOverlap
from esg_jax.evaluation.config import TEXT_TASKS, EvalConfig
from esg_jax.evaluation.driver import accumulate
from esg_jax.evaluation.panoptic import ids_from_rgb
from esg_jax.evaluation.rle import EvaluationError
from esg_jax.evaluation.semantic import SemanticIoU

# Columns of the printed table and of markdown rows.
COLUMNS = {
    "entity": ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100", "AR@100@IoU0.5", "mean_best_iou", "recall@IoU0.5"),
    "reconstruction": ("AP", "AP50", "AP75", "APs", "APm", "APl", "mean_best_iou"),
    "instance": ("AP", "AP50", "AP75", "APs", "APm", "APl"),
    "panoptic": ("PQ", "SQ", "RQ", "PQ_Th", "PQ_St"),
    "semantic": ("mIoU", "mIoU_with_predicted_only", "fwIoU", "mACC", "pACC"),
    "narrative": ("AR", "AR_Th", "AR_St", "AR_Sing", "AR_Pl", "acc@0.5"),
    "referring": ("cIoU", "gIoU", "mIoU", "P@0.5", "N-acc", "T-acc"),
}


def columns(config: EvalConfig) -> tuple[str, ...]:
    """Columns of what an evaluation measures."""
    more = ("AR_text_strict", "AR_text_loose") if config.task == "narrative" and config.phrases == "generated" else ()
    return COLUMNS[config.task] + more


def images_of(config: EvalConfig) -> list[tuple[Any, Path]]:
    """(image id, path) of the images to predict and score.

    For "semantic" the id is the name of the label map, for text the place of the image in the `TextSet`.

    Raises:
        EvaluationError: unreadable annotations.
    """
    if config.task in TEXT_TASKS:
        return [(number, image.record.image) for number, image in enumerate(text_sets.open_text_set(config).images)]
    if config.task == "semantic":
        if not Path(config.annotations).is_file():
            raise EvaluationError(f"no such file: {config.annotations}")
        lines = [line.split() for line in Path(config.annotations).read_text().splitlines() if line.strip()]
        images = [(masks, Path(config.images) / image) for image, masks in lines]
    else:
        units = formats.CocoAnnotations.load(config.annotations).units
        images = [
            (uid, Path(config.images) / _file_name(unit, f"{config.annotations}, image {uid}"))
            for uid, unit in units.items()
        ]
    return images[: config.max_images or None]


def _file_name(image: dict[str, Any], where: str) -> str:
    if "file_name" not in image and "coco_url" in image:  # LVIS names images of several COCO folders by URL
        return "/".join(image["coco_url"].split("/")[-2:])
    return formats.field(image, "file_name", where)


def score(config: EvalConfig, files: Sequence[Path], *, workers: int = 1) -> dict[str, Any]:
    """Results of the whole set (`metrics`) and, where images name a group, of every group (`groups`).

    Args:
        config: the evaluation.
        files: prediction files, one per host.
        workers: processes.
    """
    if config.task in TEXT_TASKS:
        return {"metrics": text_sets.score(config, files, workers=workers)}
    if config.task in ("panoptic", "semantic"):
        metric = (_panoptic if config.task == "panoptic" else _semantic)(config, files, workers)
        return {"metrics": metric.result()}
    annotations = formats.CocoAnnotations.load(config.annotations)
    results = formats.load_results(files, annotations.units)
    groups: dict[str, list[tuple]] = {}
    for uid, _ in images_of(config):
        name = str(annotations.units[uid].get(config.group_by, "")) if config.group_by else ""
        item = (uid, results[uid], annotations.annotations[uid], annotations.size(uid))
        groups.setdefault(name, []).append(item)

    def blank() -> list[Accumulator]:
        if config.task in ("entity", "reconstruction"):
            return [EntityAP(), BestOverlap()]
        return [AveragePrecision(categories=annotations.category_ids())]

    total, by_group = blank(), {}
    for name, items in groups.items():
        parts = blank()
        for part, whole in zip(parts, total, strict=True):
            accumulate(part, items, tasks.add_instances, workers=workers, description=f"scoring {name}".rstrip())
            whole.merge(part)
        by_group[name] = _results(parts)
    out = {"metrics": _results(total)}
    return {**out, "groups": by_group} if config.group_by else out


def _results(metrics: Sequence[Accumulator]) -> dict[str, Any]:
    return {name: value for metric in metrics for name, value in metric.result().items()}


def _panoptic(config: EvalConfig, files: Sequence[Path], workers: int) -> Accumulator:
    return tasks.panoptic_quality(
        config.annotations,
        files,
        gt_dir=config.masks or None,
        pred_dir=Path(files[0]).parent / "predictions",
        only=[uid for uid, _ in images_of(config)] if config.max_images else None,
        workers=workers,
    )


def _semantic(config: EvalConfig, files: Sequence[Path], workers: int) -> Accumulator:
    folder = Path(files[0]).parent / "predictions"
    gt = Path(config.masks) if config.masks else Path(config.annotations).with_suffix("")
    metric = SemanticIoU(config.num_classes, ignore_label=config.ignore_label)
    items = [(name, gt / name, folder / name) for name, _ in images_of(config)]
    return accumulate(metric, items, tasks.add_label_map, workers=workers, description="mIoU")


def drawings(config: EvalConfig, files: Sequence[Path]) -> Iterator[tuple[str, Path, np.ndarray, np.ndarray]]:
    """(caption, image path, predicted label map, annotated label map) of `grid_images` images spread over the set."""
    if config.task in TEXT_TASKS:
        yield from text_sets.drawings(config, files)
        return
    images = images_of(config)
    chosen = np.unique(np.linspace(0, len(images) - 1, min(config.grid_images, len(images))).round().astype(int))
    if config.task == "semantic":
        folder = Path(files[0]).parent / "predictions"
        gt = Path(config.masks) if config.masks else Path(config.annotations).with_suffix("")
        for name, path in (images[i] for i in chosen):
            target = formats.read_image(gt / name).astype(np.int16)
            target[target == config.ignore_label] = -1
            yield path.name, path, formats.read_image(folder / name).astype(np.int16), target
        return
    annotations = formats.CocoAnnotations.load(config.annotations)
    if config.task == "panoptic":
        records = {r["image_id"]: r for f in files for r in formats.load_json(f)["annotations"]}
        gt = Path(config.masks) if config.masks else Path(config.annotations).with_suffix("")
        for uid, path in (images[i] for i in chosen):
            pred = _segments(Path(files[0]).parent / "predictions" / records[uid]["file_name"])
            yield path.name, path, pred, _segments(gt / annotations.annotations[uid][0]["file_name"])
        return
    results = formats.load_results(files, annotations.units)
    for uid, path in (images[i] for i in chosen):
        size = annotations.size(uid)
        kept = sorted((r for r in results[uid] if r["score"] >= config.draw_threshold), key=lambda r: r["score"])
        pred = _paint(kept, size, f"image {uid}")
        target = _paint([a for a in annotations.annotations[uid] if not a.get("iscrowd", 0)], size, f"image {uid}")
        yield f"{path.name}, scores from {config.draw_threshold:g}", path, pred, target


def _paint(records: Sequence[dict[str, Any]], size: tuple[int, int], where: str) -> np.ndarray:
    """Label map of records, later ones on top."""
    out = np.full(size, -1, np.int16)
    for label, record in enumerate(records):
        out[rle.decode(rle.from_annotation(record["segmentation"], size, where))] = label
    return out


def _segments(path: Path) -> np.ndarray:
    """Contiguous label map of a panoptic PNG; void becomes -1."""
    ids = ids_from_rgb(formats.read_image(path, "RGB"))
    values, labels = np.unique(ids, return_inverse=True)
    labels = labels.reshape(ids.shape)
    return (labels - int(values[0] == 0)).astype(np.int16)
