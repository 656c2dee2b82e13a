"""Captions, expressions and questions whose phrases are linked to entity masks, as every reader gives them.

A source gives narratives: one text about one image, its noun phrases with their character spans, and for every phrase
the entities that it means (one, several, or none known). Several narratives may share an image.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from esg_jax.input.readers import CocoInstances, CocoPanoptic, CocoRecord, PanopticRecord, read_text
from esg_jax.input.records import Entities, Record
from esg_jax.masks import mask_file_of, read_masks

TASKS = ("description", "extraction", "grounding")

# Shares of overlap that tie a predicted mask to an annotated one: of the union, or of the predicted mask.
_LINK_IOU, _LINK_INSIDE = 0.5, 0.7


@dataclasses.dataclass(frozen=True)
class Phrase:
    """A noun phrase of a caption.

    Attributes:
        text: ``caption[start:end]``.
        entities: rows of `Record.load_entities`; empty when the phrase is linked to no mask.
        plural: the phrase speaks of several things.
    """

    text: str
    start: int
    end: int
    entities: tuple[int, ...]
    plural: bool = False


@dataclasses.dataclass(frozen=True)
class Narrative:
    """One text about an image.

    Attributes:
        record: the image and its annotated masks.
        caption: the text.
        phrases: its noun phrases; of an expression or a question, one that is the whole text.
        caption_id: as the file calls it.
        kind: "caption", "expression" (one thing is meant) or "question" (any number of things answer it, also none).
        entity_masks: where masks that replace the annotated ones lie, see `GroundingSourceConfig`.
    """

    record: Record
    caption: str
    phrases: tuple[Phrase, ...]
    caption_id: Any
    kind: str = "caption"
    entity_masks: str = ""

    def load_entities(self) -> tuple[Entities, list[tuple[int, ...]]]:
        """The entities of the label map, and those that every phrase means."""
        truth, wanted = self.record.load_entities(), [phrase.entities for phrase in self.phrases]
        if not self.entity_masks:
            return truth, wanted
        name = Path(self.record.name)
        file = mask_file_of(self.entity_masks, name.stem)
        entities = Entities.unlabelled(read_masks(file, (self.record.height, self.record.width), name.name))
        same_mn = linked_by_overlap(truth, entities)
        return entities, [tuple(np.flatnonzero(same_mn[list(rows)].any(axis=0)).tolist()) for rows in wanted]


@dataclasses.dataclass(frozen=True)
class GroundingSourceConfig:
    """Where linked captions lie, and what they are used for.

    reader: "linked_captions", "png" (Panoptic Narrative Grounding), "entity_jsonl", "refcoco" (the RefCOCO family) or
        "reasonseg".
    captions: the file with the captions or expressions; the folder of a split for "reasonseg".
    annotations: the COCO file with the masks: COCO instances for "linked_captions" (default: the caption file itself)
        and "refcoco" (default: `instances.json` beside the expressions), COCO panoptic for "png".
    split: which expressions of "refcoco" to take: "train", "val", "testA", ...
    images: folder that image names are relative to; by default the folder of the annotation or caption file.
    masks: folder of the panoptic PNGs; by default `annotations` without its suffix.
    entity_masks: masks to paint instead of the annotated ones: a COCO file, or a folder with a mask file per image,
        named like it (see `masks.read_masks`). A phrase then means the masks that overlap its annotated ones.
    exclude: text file with the ids of images to leave out, one a line (images that an evaluation uses).
    tasks: of "description", "extraction" and "grounding", those that may draw from this source.
    weight: share of this source within a task.
    """

    reader: str = "linked_captions"
    captions: str = ""
    annotations: str = ""
    images: str = ""
    masks: str = ""
    exclude: str = ""
    split: str = ""
    entity_masks: str = ""
    tasks: tuple[str, ...] = TASKS
    weight: float = 1.0

    def __post_init__(self):
        object.__setattr__(self, "tasks", tuple(self.tasks))
        unknown = set(self.tasks) - set(TASKS)
        if unknown:
            raise ValueError(f"unknown task {min(unknown)!r} of a source; choose of {', '.join(TASKS)}")

    def excluded(self) -> frozenset[str]:
        """Ids of the images to leave out."""
        return frozenset(read_text(self.exclude).split()) if self.exclude else frozenset()


class Narratives:
    """A source of narratives with random access; texts stay bytes until they are asked for.

    Attributes:
        num_phrases: int32 (n,) phrases of every narrative.
        num_linked: int32 (n,) those whose entities are known; for a question "none" is knowledge, too.
        image_rows: int32 (n,) which narratives share an image.
        kind: see `Narrative`.
        is_thing: whether the label of an entity is countable; empty when the annotations do not say.
        complete: the annotated masks are all entities of an image, not only those that the text means.
        entity_masks: see `GroundingSourceConfig`.
    """

    def __init__(
        self,
        name: str,
        records: Sequence[Record],
        rows: Sequence[tuple[int, Any, str, list[tuple]]],
        *,
        kind: str = "caption",
        is_thing: tuple[bool, ...] = (),
        complete: bool = True,
    ):
        """`rows`: record index, caption id, caption, and (start, end, entities, plural) of every phrase."""
        self._name, self._records = name, records
        self.kind, self.is_thing, self.complete, self.entity_masks = kind, is_thing, complete, ""
        self.num_phrases = np.array([len(row[3]) for row in rows], np.int32)
        linked = [sum(bool(phrase[2]) for phrase in row[3]) for row in rows]
        self.num_linked = self.num_phrases if kind == "question" else np.array(linked, np.int32)
        self.image_rows = np.array([row[0] for row in rows], np.int32)
        self._rows = [json.dumps(row).encode() for row in rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Narrative:
        record, caption_id, caption, phrases = json.loads(self._rows[index])
        return Narrative(
            self._records[record],
            caption,
            tuple(Phrase(caption[s:e], s, e, tuple(entities), plural) for s, e, entities, plural in phrases),
            caption_id,
            self.kind,
            self.entity_masks,
        )

    def __repr__(self) -> str:
        return f"Narratives({self._name}, {len(self)} {self.kind}s)"


def linked_by_overlap(truth: Entities, found: Entities) -> Bool[np.ndarray, "m n"]:
    """Which found entities are (parts of) which annotated ones: IoU of 0.5, or 0.7 of the found one inside."""
    shape = len(truth.labels) + 1, len(found.labels) + 1
    shared = np.zeros(shape, np.int64)
    for ours in truth.layers:
        for theirs in found.layers:
            pairs = ours.astype(np.int64) * shape[1] + theirs
            shared += np.bincount(pairs.ravel(), minlength=shape[0] * shape[1]).reshape(shape)
    shared = shared[1:, 1:]
    areas = found.areas
    union = truth.areas[:, None] + areas - shared
    return (shared > 0) & ((shared >= _LINK_IOU * union) | (shared >= _LINK_INSIDE * areas))


class MaskIndex:
    """Rows of images and of their masks by the ids of the files; ids may be numbers or the same numbers as text."""

    def __init__(self, source: CocoInstances | CocoPanoptic, config: GroundingSourceConfig):
        self._source = source
        self._rows = {str(source[row].image_id): row for row in range(len(source))}
        self._excluded = config.excluded()
        self._ids: dict[int, dict[str, int]] = {}

    def excluded(self, image_id: Any) -> bool:
        return str(image_id) in self._excluded

    def record(self, image_id: Any, name: str) -> int:
        row = self._rows.get(str(image_id))
        if row is None:
            raise ValueError(f"{name} belongs to image id {image_id}, which {self._source.file} does not list")
        return row

    def entities(self, row: int, mask_ids: Sequence[Any], name: str) -> list[int]:
        if row not in self._ids:
            ids = _entity_ids(self._source[row])
            self._ids[row] = {str(mask_id): rank for rank, mask_id in enumerate(ids)}
        known = self._ids[row]
        for mask_id in mask_ids:
            if str(mask_id) not in known:
                raise ValueError(
                    f"{name} is linked to mask {mask_id}, which {self._source.file} does not have for this image"
                )
        return list(dict.fromkeys(known[str(mask_id)] for mask_id in mask_ids))


def _entity_ids(record: Record) -> Sequence[Any]:
    """Ids of a record's entities, without decoding their masks."""
    if isinstance(record, PanopticRecord):
        return record.segment_ids.tolist()
    assert isinstance(record, CocoRecord)
    return [entry[0] for entry in json.loads(record.annotations)]
