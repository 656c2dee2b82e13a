"""The record that every instance-like metric scores: masks or boxes of one image with scores and labels."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from esg_jax.evaluation.metrics.errors import EvaluationError
from esg_jax.masks import rle
from esg_jax.masks.rle import RLE


@dataclasses.dataclass(frozen=True)
class Instances:
    """Segments or boxes of one image, predicted or annotated.

    Attributes:
        rles: N compressed RLEs at the image's original resolution, or None when only boxes are known.
        boxes: float64 (N, 4), x, y, width, height in pixels, or None.
        scores: float64 (N,); 1 for annotations.
        labels: int64 (N,) category ids.
        areas: float64 (N,) pixels from the `area` fields of annotations, or None: counted from mask or box.
        crowd: bool (N,): regions that predictions may match any number of times without being judged.
    """

    rles: list[RLE] | None
    boxes: np.ndarray | None
    scores: np.ndarray
    labels: np.ndarray
    areas: np.ndarray | None
    crowd: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)

    def pixel_areas(self, *, of_boxes: bool) -> np.ndarray:
        """float64 (N,): annotated areas, else those of the boxes or masks."""
        if self.areas is not None:
            return self.areas
        return self.boxes[:, 2] * self.boxes[:, 3] if of_boxes else rle.areas(self.rles)

    def select(self, index: np.ndarray) -> "Instances":
        """The instances at integer positions `index`, in that order."""
        return Instances(
            rles=None if self.rles is None else [self.rles[i] for i in index],
            boxes=None if self.boxes is None else self.boxes[index],
            scores=self.scores[index],
            labels=self.labels[index],
            areas=None if self.areas is None else self.areas[index],
            crowd=self.crowd[index],
        )


def as_instances(value: Any, *, image_id: Any = None, size: Sequence[int] | None = None) -> Instances:
    """Instances from whatever describes one image.

    Args:
        value: `Instances`; a sequence of COCO records (dictionaries with `segmentation` and/or `bbox`, and
            `category_id`, `score`, `area`, `iscrowd` where they apply); or an object or mapping with `masks`
            (bool (N, H, W), or a list of RLEs) or `rles`, and optionally `scores`, `labels`, `crowd`, `areas`, such
            as `esg_jax.inference.EntityPrediction`.
        image_id: for error messages.
        size: (height, width) of the image; needed for polygons and checked against every mask when given.

    Raises:
        EvaluationError: wrong shapes or sizes, a score that is not finite, naming the image and the record.
    """
    if isinstance(value, Instances):
        return value
    if isinstance(value, (list, tuple)):
        return _from_records(value, image_id, size)
    get = value.get if isinstance(value, Mapping) else lambda name, default=None: getattr(value, name, default)
    # Predictions of this package hold RLEs, which spare building all masks.
    masks = get("rles")
    masks = masks() if callable(masks) else masks
    if masks is None:
        masks = get("masks")
    if masks is None:
        raise EvaluationError(f"image {image_id}: expected COCO records or an object with 'masks', got {type(value)}")
    if isinstance(masks, np.ndarray) or not isinstance(masks, (list, tuple)):
        masks = np.asarray(masks)
        if size is not None and masks.shape[1:] != tuple(size):
            raise EvaluationError(f"image {image_id}: masks of {masks.shape[1:]} pixels, the image has {tuple(size)}")
        rles = rle.encode(masks)
    else:
        rles = [rle.from_annotation(m, size or m["size"], f"image {image_id}, mask {i}") for i, m in enumerate(masks)]
    count = len(rles)

    def column(name, default, dtype):
        given = get(name)
        out = np.full(count, default, dtype) if given is None else np.asarray(given).astype(dtype)
        if out.shape != (count,):
            raise EvaluationError(f"image {image_id}: {name} has shape {out.shape} for {count} masks")
        return out

    areas = get("areas")
    return _checked(
        Instances(
            rles=rles,
            boxes=None,
            scores=column("scores", 1.0, np.float64),
            labels=column("labels", 0, np.int64),
            areas=None if areas is None else np.asarray(areas, np.float64),
            crowd=column("crowd", False, bool),
        ),
        image_id,
    )


def _from_records(records: Sequence[Mapping[str, Any]], image_id: Any, size: Sequence[int] | None) -> Instances:
    def name(i):
        return f"image {image_id}, " + (f"annotation {records[i]['id']}" if "id" in records[i] else f"record {i}")

    has_masks = all(r.get("segmentation") is not None for r in records)
    has_boxes = all(r.get("bbox") is not None for r in records)
    if not has_masks and not has_boxes:
        bad = next(i for i, r in enumerate(records) if r.get("segmentation") is None and r.get("bbox") is None)
        raise EvaluationError(f"{name(bad)} has neither 'segmentation' nor 'bbox' (or the records mix the two)")
    rles = None
    if has_masks:
        rles = []
        for i, record in enumerate(records):
            segmentation = record["segmentation"]
            image_size = size
            if image_size is None:
                if not isinstance(segmentation, Mapping):
                    raise EvaluationError(f"{name(i)}: polygons need the image size")
                image_size = segmentation["size"]
            rles.append(rle.from_annotation(segmentation, image_size, name(i)))
    boxes = np.array([r["bbox"] for r in records], np.float64).reshape(-1, 4) if has_boxes else None
    # Results files may carry an `area` too; the official evaluators recount it.
    annotated = bool(records) and all("area" in r and "score" not in r for r in records)
    return _checked(
        Instances(
            rles=rles,
            boxes=boxes,
            scores=np.array([r.get("score", 1.0) for r in records], np.float64),
            labels=np.array([r.get("category_id", 0) for r in records], np.int64),
            areas=np.array([r["area"] for r in records], np.float64) if annotated else None,
            crowd=np.array([bool(r.get("iscrowd", 0)) for r in records], bool),
        ),
        image_id,
    )


def _checked(instances: Instances, image_id: Any) -> Instances:
    bad = np.flatnonzero(~np.isfinite(instances.scores))
    if bad.size:
        raise EvaluationError(f"image {image_id}, record {bad[0]}: score is {instances.scores[bad[0]]}, not a number")
    if instances.boxes is not None and not np.isfinite(instances.boxes).all():
        bad = np.flatnonzero(~np.isfinite(instances.boxes).all(1))
        box = instances.boxes[bad[0]].tolist()
        raise EvaluationError(f"image {image_id}, record {bad[0]}: box {box} is not finite")
    return instances
