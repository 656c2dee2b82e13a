"""Text linked to masks as ground truth, from the official files: what is asked, and the scores of the answers."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from esg_jax.evaluation import rle, text
from esg_jax.evaluation.config import EvalConfig
from esg_jax.evaluation.driver import accumulate
from esg_jax.evaluation.grounding import PhraseGrounding, ReferringSegmentation
from esg_jax.evaluation.rle import EvaluationError
from esg_jax.evaluation.tasks import add_instances
from esg_jax.evaluation.tasks_grounding import pair, records_by_image
from esg_jax.input.grounding_readers import open_narratives
from esg_jax.input.narratives import GroundingSourceConfig, Narrative, Phrase
from esg_jax.input.records import Record

# What a record of a task holds a list of.
FIELD = {"narrative": "phrases", "referring": "items"}


@dataclasses.dataclass(frozen=True)
class TextImage:
    """One image, and everything that is asked about it: unique id and text."""

    record: Record
    texts: tuple[tuple[str, Narrative], ...]


@dataclasses.dataclass(frozen=True)
class TextSet:
    """All images of an evaluation.

    Attributes:
        kind: "caption", "expression" or "question".
        complete: the annotated masks are all entities of an image.
        is_thing: whether a label is countable; empty when the annotations do not say.
    """

    images: list[TextImage]
    kind: str
    complete: bool
    is_thing: tuple[bool, ...]


def open_text_set(config: EvalConfig) -> TextSet:
    """Reads what the evaluation asks; captions without a linked phrase are left out.

    Raises:
        ValueError, FileNotFoundError: as `open_narratives`; texts that the task does not fit.
    """
    fields = ("reader", "captions", "annotations", "images", "masks", "split")
    narratives = open_narratives(GroundingSourceConfig(**{name: getattr(config, name) for name in fields}))
    if (narratives.kind == "caption") != (config.task == "narrative"):
        raise EvaluationError(
            f"reader {config.reader!r} gives {narratives.kind}s; task 'narrative' is for captions, 'referring' for "
            "expressions and questions"
        )
    groups: dict[int, list[int]] = {}
    for row in np.flatnonzero(narratives.num_linked > 0).tolist():
        groups.setdefault(int(narratives.image_rows[row]), []).append(row)
    images, seen = [], set()
    for rows in list(groups.values())[: config.max_images or None]:
        texts = []
        for row in rows:
            narrative = narratives[row]
            uid = str(narrative.caption_id)
            while uid in seen:  # two captions of one annotator
                uid += "+"
            seen.add(uid)
            texts.append((uid, narrative))
        images.append(TextImage(texts[0][1].record, tuple(texts)))
    if not images:
        raise EvaluationError(f"{config.captions} has no phrase that is linked to a mask")
    return TextSet(images, narratives.kind, narratives.complete, narratives.is_thing)


def linked_phrases(narrative: Narrative) -> list[Phrase]:
    """The phrases that an answer is scored for."""
    return [phrase for phrase in narrative.phrases if phrase.entities or narrative.kind == "question"]


def truth(texts: TextSet, config: EvalConfig) -> dict[str, list[dict[str, Any]]]:
    """Per text, `gt` (RLE) of every scored phrase with `text`, `plural`, `isthing`, and perhaps `ignore` (RLE)."""
    out = {}
    for image in texts.images:
        entities, ignored = image.record.load_entities(), image.record.load_ignore()
        more = {} if ignored is None else {"ignore": _encode(ignored)}
        for uid, narrative in image.texts:
            out[uid] = []
            for phrase in linked_phrases(narrative):
                mask = np.zeros((image.record.height, image.record.width), bool)
                for entity in phrase.entities:
                    mask |= entities.mask(entity)
                # As first published, the last segment of a phrase says whether it is a thing.
                thing = texts.is_thing[entities.labels[phrase.entities[-1]]] if texts.is_thing else True
                plural = len(phrase.entities) > 1 if config.plural_by == "segments" else phrase.plural
                out[uid].append({"gt": _encode(mask), "text": phrase.text, "plural": plural, "isthing": thing, **more})
    return out


def _encode(mask: np.ndarray) -> dict[str, Any]:
    code = rle.encode(mask[None])[0]
    return {"size": list(code["size"]), "counts": code["counts"].decode("ascii")}


def blank(size: Sequence[int]) -> dict[str, Any]:
    """RLE of a mask that was not found."""
    return {"size": list(size), "counts": rle.empty(size)["counts"].decode("ascii")}


Answered = list[tuple[str, list[dict[str, Any]]]]


def answers(config: EvalConfig, texts: TextSet, preds: dict[str, list[dict[str, Any]]], where: str) -> Answered:
    """(id, scored phrases with `gt` and `pred`) of every text.

    Raises:
        EvaluationError: predictions of other texts than the ground truth has, or too few of one.
    """
    targets = truth(texts, config)
    paired = preds
    if config.task == "narrative" and config.phrases == "generated" and set(targets) == set(preds):
        paired = {uid: _aligned(targets[uid], preds[uid]) for uid in targets}
    return pair(targets, paired, FIELD[config.task], config.captions, where)


def _aligned(wanted: list[dict[str, Any]], listed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The listed phrase that names each annotated one; those that were not listed get an empty mask."""
    found = text.align([phrase["text"] for phrase in listed], [phrase["text"] for phrase in wanted])
    return [
        {"pred": blank(target["gt"]["size"]) if index is None else listed[index]["pred"]}
        for target, index in zip(wanted, found, strict=True)
    ]


def score(config: EvalConfig, files: Sequence[Path], *, workers: int = 1) -> dict[str, Any]:
    """Results of saved answers."""
    preds = records_by_image(files, FIELD[config.task])
    items = answers(config, open_text_set(config), preds, ", ".join(map(str, files)))
    if config.task == "referring":
        metric = ReferringSegmentation()
        return accumulate(metric, items, add_instances, workers=workers, description="cIoU / gIoU").result()
    metric = PhraseGrounding(soft=config.soft)
    result = accumulate(metric, items, add_instances, workers=workers, description="PNG AR").result()
    if config.phrases == "generated":
        recall = text.TextRecall()
        for uid, phrases in items:
            recall.add(uid, [phrase["text"] for phrase in preds[uid]], [phrase["text"] for phrase in phrases])
        result |= {name: value for name, value in recall.result().items() if name.startswith("AR_text")}
    return result


def drawings(config: EvalConfig, files: Sequence[Path]) -> Iterator[tuple[str, Path, np.ndarray, np.ndarray]]:
    """(title, image path, answered label map, annotated label map) of `grid_images` texts spread over the set."""
    texts, preds = open_text_set(config), records_by_image(files, FIELD[config.task])
    asked = [(image.record, uid, narrative) for image in texts.images for uid, narrative in image.texts]
    chosen = np.unique(np.linspace(0, len(asked) - 1, min(config.grid_images, len(asked))).round().astype(int))
    for record, uid, narrative in (asked[index] for index in chosen):
        alone = dataclasses.replace(texts, images=[TextImage(record, ((uid, narrative),))])
        ((_, phrases),) = answers(config, alone, {uid: preds[uid]}, ", ".join(map(str, files)))
        maps = []
        for role in ("pred", "gt"):
            out = np.full((record.height, record.width), -1, np.int16)
            for label, phrase in enumerate(phrases):
                out[rle.decode(rle.from_annotation(phrase[role], out.shape, f"text {uid}"))] = label
            maps.append(out)
        assert isinstance(record.image, Path)
        yield narrative.caption[:80], record.image, *maps
