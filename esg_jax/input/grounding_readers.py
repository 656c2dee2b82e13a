"""Readers of captions whose noun phrases are linked to entity masks; `open_narratives` opens any source of text."""

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from esg_jax.input import image_io
from esg_jax.input.narratives import TASKS as TASKS
from esg_jax.input.narratives import GroundingSourceConfig, MaskIndex, Narratives
from esg_jax.input.readers import CocoInstances, CocoPanoptic, SourceConfig, list_of, read_json, read_text
from esg_jax.input.records import Entities, Record
from esg_jax.input.referring_readers import reasonseg, refcoco
from esg_jax.masks import read_masks
from esg_jax.text.sequences import locate

logger = logging.getLogger(__name__)


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
    narratives.entity_masks = config.entity_masks
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
    index = MaskIndex(source, config)
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
    index = MaskIndex(source, config)
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
    return Narratives(config.captions, source, rows, is_thing=source.is_thing)


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

    `masks` is any file of `masks.read_masks`; `nouns` has a list of noun phrases per caption, in order of
    appearance; `links`, when there, a list of mask ids per noun.
    """
    folder = Path(config.images) if config.images else Path(config.captions).parent
    masks_folder = Path(config.masks) if config.masks else folder
    excluded = config.excluded()
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
        return Entities.unlabelled(read_masks(self.mask_file, (self.height, self.width), Path(self.name).name))


_READERS: Mapping[str, Callable[[GroundingSourceConfig], Narratives]] = {
    "linked_captions": _linked_captions,
    "png": _panoptic_narratives,
    "entity_jsonl": _entity_jsonl,
    "refcoco": refcoco,
    "reasonseg": reasonseg,
}
