"""Grounding results to files: JSON, pictures, and the formats that `esg evaluate` reads."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from esg_jax.inference.grounding.results import CategoryResult, GroundingResult
from esg_jax.masks import BACKGROUND
from esg_jax.masks.write import write_id_png
from esg_jax.viz.overlay import overlay
from esg_jax.viz.phrases import phrase_picture


def write_json(path: str | Path, result: GroundingResult | CategoryResult, image_name: str = "") -> None:
    """One result as JSON, see its `to_dict`."""
    Path(path).write_text(json.dumps({"image": image_name, **result.to_dict()}, indent=1))


def picture(image_hw3: np.ndarray, result: GroundingResult | CategoryResult, *, max_side: int = 1600) -> np.ndarray:
    """RGB picture: phrases in the colours of their masks, or entities tagged with their categories."""
    label_map = result.scene.masks.label_map
    if isinstance(result, GroundingResult):
        phrases = [(phrase.text, phrase.span, phrase.entities) for phrase in result.phrases]
        text = result.text or result.prompt
        return phrase_picture(image_hw3, label_map, text, phrases, max_side=max_side)
    table = np.full(len(result.scene.masks) + 1, BACKGROUND)
    tags = []
    for number, segment in enumerate(result.segments, start=1):
        tags.append(f"{result.names[segment.category]} {segment.score:.2f}")
        for entity in segment.entities:
            if table[entity + 1] == BACKGROUND:  # of several classes of one entity, the best one is shown
                table[entity + 1] = number
    return overlay(image_hw3, table[label_map], tags, max_side=max_side)


def write_picture(path: str | Path, image_hw3: np.ndarray, result: GroundingResult | CategoryResult) -> None:
    """PNG of `picture`."""
    Image.fromarray(picture(image_hw3, result)).save(path)


def phrase_record(
    image_id: Any, result: GroundingResult, truth: Sequence[Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """One narrative for `esg evaluate png-ar`.

    Args:
        image_id: unique id of the narrative.
        result: with one phrase per annotated phrase, in order (forced).
        truth: fields to add to each phrase: `gt` (RLE), `plural`, `isthing`.

    Raises:
        ValueError: other phrases than the truth has.
    """
    return {"image_id": image_id, "phrases": _predictions(result, truth)}


def referring_record(
    image_id: Any, results: Sequence[GroundingResult], truth: Sequence[Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """All expressions or questions of one image for `esg evaluate` of referring and reasoning segmentation (cIoU)."""
    items = [_predictions(result, None)[0] for result in results]
    return {"image_id": image_id, "items": _joined(items, truth)}


def text_record(result: GroundingResult) -> list[str]:
    """The grounded phrases of a generated caption, for `esg evaluate ar-text`."""
    return [phrase.text for phrase in result.phrases if phrase.found]


def instance_records(image_id: Any, result: CategoryResult, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """COCO result records of scored instances."""
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[segment.category],
            "segmentation": result.scene.rle(segment.entities),
            "score": round(segment.score, 6),
        }
        for segment in result.segments
    ]


def panoptic_record(
    folder: str | Path, image_id: Any, stem: str, result: CategoryResult, category_ids: Sequence[int]
) -> dict[str, Any]:
    """Writes the PNG of one image in COCO's id code to `folder`; gives the record for the JSON's `annotations`."""
    table = np.zeros(len(result.scene.masks) + 1, np.int32)
    segments = []
    for number, segment in enumerate(result.segments, start=1):
        table[np.asarray(segment.entities) + 1] = number
        segments.append({"id": number, "category_id": category_ids[segment.category], "score": segment.score})
    write_id_png(Path(folder) / f"{stem}.png", table[result.scene.masks.label_map])
    return {"image_id": image_id, "file_name": f"{stem}.png", "segments_info": segments}


def _predictions(result: GroundingResult, truth) -> list[dict[str, Any]]:
    return _joined([{"pred": result.scene.rle(phrase.entities)} for phrase in result.phrases], truth)


def _joined(items: list[dict[str, Any]], truth) -> list[dict[str, Any]]:
    if truth is None:
        return items
    if len(truth) != len(items):
        raise ValueError(f"{len(items)} predictions for {len(truth)} annotated ones")
    return [{**wanted, **item} for wanted, item in zip(truth, items, strict=True)]
