"""What the tasks on COCO annotations share: ground truth, and scores and pictures of a results file."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from esg_jax.evaluation.formats.coco import CocoAnnotations, add_instances, load_results
from esg_jax.evaluation.formats.files import field
from esg_jax.evaluation.metrics.accumulator import Accumulator
from esg_jax.evaluation.tasks.task import EvalTask, Truth
from esg_jax.evaluation.workers import accumulate
from esg_jax.input.image_io import load_image
from esg_jax.masks import rle
from esg_jax.viz import GridRow


@dataclasses.dataclass(frozen=True)
class CocoTask(EvalTask):
    """annotations: COCO JSON."""

    def truth(self) -> Truth:
        annotations = CocoAnnotations.load(self.annotations)
        images = [
            (uid, Path(self.images) / _file_name(unit, f"{self.annotations}, image {uid}"))
            for uid, unit in annotations.units.items()
        ]
        return Truth(images[: self.max_images or None], annotations)

    def categories(self, truth: Truth) -> list[dict[str, Any]]:
        """Category records in the order of their ids, which is that of a model's classes."""
        return sorted(truth.content.categories, key=lambda category: category["id"])


def _file_name(image: dict[str, Any], where: str) -> str:
    if "file_name" not in image and "coco_url" in image:  # LVIS names images of several COCO folders by URL
        return "/".join(image["coco_url"].split("/")[-2:])
    return field(image, "file_name", where)


@dataclasses.dataclass(frozen=True)
class ResultsTask(CocoTask):
    """Predictions are COCO result records.

    group_by: field of the image records; scores are also given per value of it.
    draw_threshold: least score of the masks drawn.
    """

    group_by: str = ""
    draw_threshold: float = 0.3

    def metrics(self, truth: Truth) -> list[Accumulator]:
        """The metrics, with nothing added yet."""
        raise NotImplementedError

    def score(self, truth: Truth, files: Sequence[Path], *, workers: int = 1) -> dict[str, Any]:
        annotations = truth.content
        results = load_results(files, annotations.units)
        groups: dict[str, list[tuple]] = {}
        for uid, _ in truth.images:
            name = str(annotations.units[uid].get(self.group_by, "")) if self.group_by else ""
            item = (uid, results[uid], annotations.annotations[uid], annotations.size(uid))
            groups.setdefault(name, []).append(item)
        total, by_group = self.metrics(truth), {}
        for name, items in groups.items():
            parts = self.metrics(truth)
            for part, whole in zip(parts, total, strict=True):
                accumulate(part, items, add_instances, workers=workers, description=f"scoring {name}".rstrip())
                whole.merge(part)
            by_group[name] = _results(parts)
        out = {"metrics": _results(total)}
        return {**out, "groups": by_group} if self.group_by else out

    def draw(self, truth: Truth, files: Sequence[Path]) -> Iterator[GridRow]:
        annotations = truth.content
        results = load_results(files, annotations.units)
        for uid, path in self.spread(truth.images):
            size, where = annotations.size(uid), f"image {uid}"
            kept = sorted((r for r in results[uid] if r["score"] >= self.draw_threshold), key=lambda r: r["score"])
            target = paint([a for a in annotations.annotations[uid] if not a.get("iscrowd", 0)], size, where)
            title = f"{path.name}, scores from {self.draw_threshold:g}"
            yield GridRow(load_image(path), paint(kept, size, where), target, title)


def _results(metrics: Sequence[Accumulator]) -> dict[str, Any]:
    return {name: value for metric in metrics for name, value in metric.result().items()}


def result_records(
    image_id: Any, rles: Sequence[rle.RLE], scores: Sequence[float], categories: Sequence[int]
) -> list[dict[str, Any]]:
    """COCO result records of one image."""
    return [
        {"image_id": image_id, "category_id": int(category), "score": float(score), "segmentation": rle.to_json(code)}
        for code, score, category in zip(rles, scores, categories, strict=True)
    ]


def ordered_records(by_image: Iterable[tuple[int, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """The records of all images, in the order of their places."""
    return [record for _, records in sorted(by_image, key=lambda pair: pair[0]) for record in records]


def paint(records: Sequence[dict[str, Any]], size: Sequence[int], where: str, key: str = "segmentation") -> np.ndarray:
    """Label map of the masks under `key`, later ones on top."""
    out = np.zeros(size, np.int16)
    for label, record in enumerate(records, start=1):
        out[rle.decode(rle.from_annotation(record[key], size, where))] = label
    return out
