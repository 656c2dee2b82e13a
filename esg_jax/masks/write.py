"""Masks to files that other tools, and `read_masks`, read."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from esg_jax.masks import rle
from esg_jax.masks.mask_set import MaskSet


def coco_records(rles: Sequence[rle.RLE]) -> list[dict[str, Any]]:
    """COCO `area`, `bbox` (x, y, width, height) and `segmentation` of every mask."""
    columns = (rle.areas(rles).astype(int).tolist(), rle.boxes(rles).astype(int).tolist(), map(rle.to_json, rles))
    return [{"area": area, "bbox": box, "segmentation": code} for area, box, code in zip(*columns, strict=True)]


def coco_results(masks: MaskSet, image_id: int, category_id: int = 1) -> list[dict[str, Any]]:
    """COCO result records of all masks that are not empty, which need `scores`.

    Entities have no class; the reference's evaluation folds all categories into number 1.
    """
    return [
        {"image_id": image_id, "category_id": category_id, **record, "score": round(float(score), 6)}
        for record, score in zip(coco_records(masks.rles()), masks.scores, strict=True)
        if record["area"]
    ]


class CocoFile:
    """Collects masks of many images into one COCO file: `images`, `annotations` with a score, `categories`.

    Evaluation tools take it as a results file, annotation tools as a data set.
    """

    def __init__(self):
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def add(self, masks: MaskSet, file_name: str, image_id: int) -> None:
        """Adds the masks of one image."""
        height, width = masks.size
        self.images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        for record in coco_results(masks, image_id):
            self.annotations.append({"id": len(self.annotations) + 1, "iscrowd": 0, **record})

    def write(self, path: str | Path) -> None:
        """Writes the file, images by id."""
        content = {
            "images": sorted(self.images, key=lambda image: image["id"]),
            "annotations": self.annotations,
            "categories": [{"id": 1, "name": "entity"}],
        }
        Path(path).write_text(json.dumps(content))


def write_label_map(path: str | Path, masks: MaskSet, colors: UInt8[np.ndarray, "n 3"] | None = None) -> None:
    """PNG of the original size: 0 = nothing, k + 1 = mask k.

    Up to 255 masks 8 bits (the pixel values are the labels; viewers show `colors`), else 16.
    """
    if len(masks) > 255:
        Image.fromarray(masks.label_map.astype(np.uint16)).save(path)
        return
    image = Image.fromarray(masks.label_map.astype(np.uint8), mode="L" if colors is None else "P")
    if colors is not None:
        table = np.zeros((256, 3), np.uint8)
        table[1 : len(masks) + 1] = colors
        image.putpalette(table.tobytes())
    image.save(path)


def write_id_png(path: str | Path, ids_hw: Int[np.ndarray, "h w"]) -> None:
    """PNG in COCO panoptic's code: segment ids as R + 256 G + 65536 B, 0 = nothing."""
    rgb = np.stack([ids_hw % 256, ids_hw // 256 % 256, ids_hw // 65536], -1)
    Image.fromarray(rgb.astype(np.uint8)).save(path)


def write_arrays(path: str | Path, masks: MaskSet, columns: Sequence[str] = ("scores",)) -> None:
    """Compressed npz: `masks`, the label map (0 = nothing, k + 1 = mask k), and the named columns."""
    np.savez_compressed(path, masks=masks.label_map, **{name: getattr(masks, name) for name in columns})
