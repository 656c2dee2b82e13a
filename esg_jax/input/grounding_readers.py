"""Readers of captions whose noun phrases are linked to entity masks.

A source gives narratives: one caption of one image, its noun phrases with their character spans, and for every phrase
the entities that it means (one, several, or none known). Several narratives may share an image.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from esg_jax.input import image_io, mask_files
from esg_jax.input.readers import (
    CocoInstances,
    CocoPanoptic,
    CocoRecord,
    PanopticRecord,
    SourceConfig,
    list_of,
    read_json,
    read_text,
)
from esg_jax.input.records import Entities, Record
from esg_jax.text.sequences import locate

logger = logging.getLogger(__name__)

TASKS = ("description", "extraction", "grounding")


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
    """One caption of an image."""

    record: Record
    caption: str
    phrases: tuple[Phrase, ...]
    caption_id: Any


@dataclasses.dataclass(frozen=True)
class GroundingSourceConfig:
    """Where linked captions lie, and what they are used for.

    reader: "linked_captions", "png" (Panoptic Narrative Grounding) or "entity_jsonl".
    captions: the file with the captions.
    annotations: the COCO file with the masks: COCO instances for "linked_captions" (default: the caption file itself),
        COCO panoptic for "png".
    images: folder that image names are relative to; by default the folder of the annotation or caption file.
    masks: folder of the panoptic PNGs; by default `annotations` without its suffix.
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
    tasks: tuple[str, ...] = TASKS
    weight: float = 1.0

    def __post_init__(self):
        object.__setattr__(self, "tasks", tuple(self.tasks))
        unknown = set(self.tasks) - set(TASKS)
        if unknown:
            raise ValueError(f"unknown task {min(unknown)!r} of a source; choose of {', '.join(TASKS)}")


class Narratives:
    """A source of narratives with random access; captions stay bytes until they are asked for.

    Attributes:
        num_phrases: int32 (n,) phrases of every narrative.
        num_linked: int32 (n,) those that are linked to an entity.
    """

    def __init__(self, name: str, records: Sequence[Record], rows: Sequence[tuple[int, Any, str, list[tuple]]]):
        """`rows`: record index, caption id, caption, and (start, end, entities, plural) of every phrase."""
        self._name, self._records = name, records
        self.num_phrases = np.array([len(row[3]) for row in rows], np.int32)
        self.num_linked = np.array([sum(bool(phrase[2]) for phrase in row[3]) for row in rows], np.int32)
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
        )

    def __repr__(self) -> str:
        return f"Narratives({self._name}, {len(self)} captions)"


def open_narratives(config: GroundingSourceConfig) -> Narratives:
    """Reads the captions and the index of the masks.

    Raises:
        ValueError: unknown reader, or a malformed file: an unknown image or mask id, a phrase that is not where its
            span says. The message names file, caption and phrase.
        FileNotFoundError: no such file or folder.
    """
    if config.reader not in _READERS:
        raise ValueError(f"unknown reader {config.reader!r}; choose one of {', '.join(sorted(_READERS))}")
    narratives = _READERS[config.reader](config)
    if not len(narratives):
        raise ValueError(f"{config.captions} has no caption with an image that is not excluded")
    return narratives


def _linked_captions(config: GroundingSourceConfig) -> Narratives:
    """JSON with `captions`: id, image_id, caption, phrases (text, start, end, plural, mask_ids).

    Masks are the `annotations` of the same file or of a COCO file. Annotations may carry a `category` name instead of
    a `category_id`.
    """
    content = read_json(config.captions)
    masks_file = config.annotations or config.captions
    images = SourceConfig(annotations=masks_file, images=config.images)
    source = CocoInstances(
        images, _with_categories(content if masks_file == config.captions else read_json(masks_file))
    )
    index = _Index(source, config)
    rows = []
    for caption in list_of(content, "captions", config.captions):
        name = f"{config.captions}: caption {caption.get('id', '(without id)')}"
        for key in ("image_id", "caption", "phrases"):
            if key not in caption:
                raise ValueError(f"{name} has no {key!r}")
        if index.excluded(caption["image_id"]):
            continue
        record = index.record(caption["image_id"], name)
        phrases = []
        for phrase in caption["phrases"]:
            span, text = (phrase.get("start"), phrase.get("end")), phrase.get("text")
            if not isinstance(span[0], int) or caption["caption"][span[0] : span[1]] != text:
                raise ValueError(
                    f"{name}: phrase {text!r} is not at characters {span[0]}..{span[1]} of {caption['caption']!r}"
                )
            entities = index.entities(record, phrase.get("mask_ids", ()), f"{name}, phrase {text!r}")
            phrases.append((*span, entities, bool(phrase.get("plural", len(entities) > 1))))
        rows.append((record, caption.get("id"), caption["caption"], sorted(phrases)))
    return Narratives(config.captions, source, rows)


def _with_categories(content: dict[str, Any]) -> dict[str, Any]:
    """Category ids for annotations that only have a category's name."""
    annotations = content.get("annotations")
    if "categories" in content or not isinstance(annotations, list):
        return content
    names = sorted({str(annotation.get("category", "entity")) for annotation in annotations})
    ids = {name: number for number, name in enumerate(names, start=1)}
    numbered = [{**entry, "category_id": ids[str(entry.get("category", "entity"))]} for entry in annotations]
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    return {**content, "annotations": numbered, "categories": categories}


def _panoptic_narratives(config: GroundingSourceConfig) -> Narratives:
    """`png_coco_{train,val}2017.json` with COCO panoptic annotations (Gonzalez et al., ICCV 2021).

    A phrase is an utterance with segment ids; nouns without are not grounded and left out. Where the lower-cased
    utterances are not found one after the other in the caption, the caption is rebuilt from them.
    """
    source = CocoPanoptic(SourceConfig("coco_panoptic", config.annotations, config.images, config.masks))
    index = _Index(source, config)
    try:
        narratives = json.loads(read_text(config.captions))
    except json.JSONDecodeError as error:
        raise ValueError(f"{config.captions} is not valid JSON: {error}") from error
    if not isinstance(narratives, list):
        raise ValueError(f"{config.captions} holds a {type(narratives).__name__}, expected a list of narratives")
    rows, rebuilt = [], 0
    for number, narrative in enumerate(narratives):
        name = f"{config.captions}: narrative {number}"
        for key in ("image_id", "caption", "segments"):
            if key not in narrative:
                raise ValueError(f"{name} has no {key!r}")
        if index.excluded(narrative["image_id"]):
            continue
        record = index.record(narrative["image_id"], name)
        utterances = [str(segment["utterance"]) for segment in narrative["segments"]]
        caption = narrative["caption"]
        spans = _align(caption, utterances)
        if spans is None:
            caption, spans = _rebuild(utterances)
            rebuilt += 1
        phrases = []
        for segment, span in zip(narrative["segments"], spans, strict=True):
            if segment["segment_ids"]:
                where = f"{name} (image {narrative['image_id']}), phrase {segment['utterance']!r}"
                entities = index.entities(record, segment["segment_ids"], where)
                phrases.append((*span, entities, bool(segment.get("plural", False))))
        annotator = narrative.get("annotator_id", number)
        rows.append((record, f"{narrative['image_id']}_{annotator}", caption, phrases))
    if rebuilt:
        logger.info("%s: %d of %d captions rebuilt from their utterances", config.captions, rebuilt, len(rows))
    return Narratives(config.captions, source, rows)


def _align(caption: str, utterances: Sequence[str]) -> list[tuple[int, int]] | None:
    """Spans of all utterances in order, when nothing but spaces lies between them."""
    lower, position, spans = caption.lower(), 0, []
    if len(lower) != len(caption):
        return None
    for utterance in utterances:
        text = utterance.lower().strip()
        start = lower.find(text, position)
        if start < 0 or lower[position:start].strip():
            return None
        position = start + len(text)
        spans.append((start, position))
    return spans


def _rebuild(utterances: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    caption, spans = "", []
    for utterance in (utterance.strip() for utterance in utterances):
        if caption and not (len(utterance) == 1 and utterance in ".,;:!?)"):
            caption += " "
        spans.append((len(caption), len(caption) + len(utterance)))
        caption += utterance
    return caption, spans


def _entity_jsonl(config: GroundingSourceConfig) -> Narratives:
    """One JSON object a line: image, masks, captions, nouns, perhaps links.

    `masks` is any file of `mask_files.read_masks`; `nouns` has a list of noun phrases per caption, in order of
    appearance; `links`, when there, a list of mask ids per noun.
    """
    folder = Path(config.images) if config.images else Path(config.captions).parent
    masks_folder = Path(config.masks) if config.masks else folder
    excluded = _excluded(config)
    records, rows = [], []
    for number, line in enumerate(read_text(config.captions).splitlines(), start=1):
        name = f"{config.captions}, line {number}"
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} is not valid JSON: {error}") from error
        for key in ("image", "masks", "captions", "nouns"):
            if key not in entry:
                raise ValueError(f"{name} has no {key!r}")
        captions, nouns = entry["captions"], entry["nouns"]
        links = entry.get("links") or [[[]] * len(own) for own in nouns]
        if not len(captions) == len(nouns) == len(links):
            raise ValueError(f"{name} has {len(captions)} captions, {len(nouns)} lists of nouns, {len(links)} of links")
        if str(entry["image"]) in excluded:
            continue
        image = folder / entry["image"]
        size = image_io.image_size(image)
        record = MaskFileRecord(image, entry["image"], entry["image"], *size, masks_folder / entry["masks"])
        # Ids are needed only to resolve links; without links no mask is read here.
        ids = list(record.load_entities().ids) if entry.get("links") else []
        records.append(record)
        for turn, (caption, own, own_links) in enumerate(zip(captions, nouns, links, strict=True)):
            if len(own) != len(own_links):
                raise ValueError(f"{name}: {len(own)} nouns and {len(own_links)} links of caption {turn + 1}")
            phrases = []
            for noun, span, wanted in zip(own, locate(caption, own), own_links, strict=True):
                if span is None:
                    raise ValueError(f"{name}: noun {noun!r} does not occur in caption {turn + 1}: {caption!r}")
                unknown = [mask_id for mask_id in wanted if mask_id not in ids]
                if unknown:
                    raise ValueError(f"{name}: noun {noun!r} has mask id {unknown[0]}, which {entry['masks']} lacks")
                phrases.append((*span, [ids.index(mask_id) for mask_id in wanted], len(wanted) > 1))
            rows.append((len(records) - 1, f"{entry['image']}_{turn}", caption, sorted(phrases)))
    return Narratives(config.captions, records, rows)


@dataclasses.dataclass(frozen=True)
class MaskFileRecord(Record):
    """An image whose masks lie in one file of their own."""

    mask_file: Path

    def load_entities(self) -> Entities:
        masks = mask_files.read_masks(self.mask_file, (self.height, self.width), Path(self.name).name)
        count = len(masks)
        return Entities(masks.layers, np.zeros(count, np.int32), np.zeros(count, bool), masks.ids)


class _Index:
    """Rows of images and of their masks by the ids of the files; ids may be numbers or the same numbers as text."""

    def __init__(self, source: CocoInstances | CocoPanoptic, config: GroundingSourceConfig):
        self._source = source
        self._rows = {str(source[row].image_id): row for row in range(len(source))}
        self._excluded = _excluded(config)
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
        return sorted({known[str(mask_id)] for mask_id in mask_ids})


def _entity_ids(record: Record) -> Sequence[Any]:
    """Ids of a record's entities, without decoding their masks."""
    if isinstance(record, PanopticRecord):
        return record.segment_ids.tolist()
    assert isinstance(record, CocoRecord)
    return [entry[0] for entry in json.loads(record.annotations)]


def _excluded(config: GroundingSourceConfig) -> frozenset[str]:
    return frozenset(read_text(config.exclude).split()) if config.exclude else frozenset()


_READERS: Mapping[str, Callable[[GroundingSourceConfig], Narratives]] = {
    "linked_captions": _linked_captions,
    "png": _panoptic_narratives,
    "entity_jsonl": _entity_jsonl,
}
