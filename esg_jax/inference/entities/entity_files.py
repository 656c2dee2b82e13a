"""Predictions to files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from esg_jax.inference.entities.predictions import EntityPrediction
from esg_jax.viz.overlay import overlay
from esg_jax.viz.palette import assign_colors, palette


def coco_results(prediction: EntityPrediction, image_id: int, category_id: int = 1) -> list[dict[str, Any]]:
    """COCO result records of all non-empty rows: image_id, category_id, segmentation (RLE), area, bbox (xywh), score.

    Entities have no class; the reference's evaluation folds all categories into number 1.
    """
    records = []
    areas, boxes = prediction.areas, _boxes_xywh(prediction)
    for row, rle in enumerate(prediction.rles()):
        if areas[row]:
            records.append(
                {
                    "image_id": image_id,
                    "category_id": category_id,
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
                    "area": int(areas[row]),
                    "bbox": boxes[row],
                    "score": round(float(prediction.scores[row]), 6),
                }
            )
    return records


def _boxes_xywh(prediction: EntityPrediction) -> list[list[int]]:
    count, bounds = len(prediction), []
    for axis in (1, 0):  # x from the columns, then y from the rows
        size = prediction.label_map.shape[axis]
        present = np.zeros((size, count + 1), bool)
        positions = np.arange(size)
        index = positions[None, :] if axis == 1 else positions[:, None]
        present[np.broadcast_to(index, prediction.label_map.shape), prediction.label_map] = True
        present = present[:, :count]
        bounds.append((present.argmax(0), size - present[::-1].argmax(0)))
    (x0, x1), (y0, y1) = bounds
    return [[int(value) for value in box] for box in np.stack([x0, y0, x1 - x0, y1 - y0], axis=1)]


class CocoFile:
    """Collects predictions of many images into one COCO file: `images`, `annotations` with a score, `categories`.

    Evaluation tools take it as a results file, annotation tools as a data set.
    """

    def __init__(self):
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def add(self, prediction: EntityPrediction, file_name: str, image_id: int) -> None:
        """Adds the entities of one image."""
        height, width = prediction.size
        self.images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        for record in coco_results(prediction, image_id):
            self.annotations.append({"id": len(self.annotations) + 1, "iscrowd": 0, **record})

    def write(self, path: str | Path) -> None:
        """Writes the file, images by id."""
        content = {
            "images": sorted(self.images, key=lambda image: image["id"]),
            "annotations": self.annotations,
            "categories": [{"id": 1, "name": "entity"}],
        }
        Path(path).write_text(json.dumps(content))


def write_label_map(path: str | Path, prediction: EntityPrediction) -> None:
    """PNG of the original size: 0 = no entity, k = row k - 1 of the prediction.

    Up to 255 entities 8 bits with a colour palette (the pixel values are the labels; viewers show colours), else 16.
    """
    labels = prediction.label_map.astype(np.int32) + 1
    count = len(prediction)
    if count > 255:
        Image.fromarray(labels.astype(np.uint16)).save(path)
        return
    image = Image.fromarray(labels.astype(np.uint8), mode="P")
    colors = np.zeros((256, 3), np.uint8)
    colors[1 : count + 1] = palette()[assign_colors(prediction.label_map, count)]
    image.putpalette(colors.tobytes())
    image.save(path)


def write_overlay(
    path: str | Path,
    image_hw3: np.ndarray,
    prediction: EntityPrediction,
    names: Sequence[str] | None = None,
    *,
    max_side: int = 1600,
) -> None:
    """PNG of the photograph with tinted, outlined entities, tagged with class (when `names` are given) and score."""
    tags = [f"{score:.2f}" for score in prediction.scores]
    if names is not None:
        tags = [f"{names[label]} {tag}" for label, tag in zip(prediction.labels, tags, strict=True)]
    Image.fromarray(overlay(image_hw3, prediction.label_map, tags, max_side=max_side)).save(path)


def write_arrays(path: str | Path, prediction: EntityPrediction) -> None:
    """Compressed npz: label_map (int16, -1 = none), scores, class_scores, labels, queries."""
    names = ("label_map", "scores", "class_scores", "labels", "queries")
    np.savez_compressed(path, **{name: getattr(prediction, name) for name in names})
