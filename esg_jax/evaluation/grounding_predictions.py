"""Answers of a GELLA to everything that an evaluation asks, as records of the files that are then scored."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from esg_jax.evaluation import formats
from esg_jax.evaluation.config import TEXT_TASKS, EvalConfig
from esg_jax.evaluation.rle import EvaluationError
from esg_jax.evaluation.text_sets import TextImage, blank, linked_phrases, open_text_set
from esg_jax.inference.bundle import Bundle
from esg_jax.inference.entities.predictor import Predictor
from esg_jax.inference.grounding import grounding_files
from esg_jax.inference.grounding.decisions import read_rules
from esg_jax.inference.grounding.grounder import Grounder
from esg_jax.inference.grounding.results import Scene
from esg_jax.inference.masks_in import EntityMasks, NoMasksError, disjoint_masks
from esg_jax.input.mask_files import MaskSet, mask_file_of, read_masks
from esg_jax.input.readers import SourceConfig, open_source
from esg_jax.input.records import Record
from esg_jax.models.gella import GellaConfig

_READERS = {"panoptic": "coco_panoptic", "instance": "coco_instances"}


def needs_grounder(config: EvalConfig, bundle: Bundle) -> bool:
    """Whether the task is one of text, or the weights are GELLA's, which names entities."""
    return config.task in TEXT_TASKS or isinstance(bundle.config, GellaConfig)


def predict(
    config: EvalConfig,
    bundle: Bundle,
    images: Sequence[tuple[Any, Path]],
    out: Path,
    advance: Callable[[int], None],
) -> Any:
    """What the file of predictions holds, for these images of `run.images_of`.

    Raises:
        ValueError, FileNotFoundError: a task that GELLA does not do, weights of another model, unusable masks.
    """
    if config.task not in (*TEXT_TASKS, *_READERS):
        raise EvaluationError(f"{bundle.name} holds a GELLA, which does no task {config.task!r}")
    masks = InputMasks(config)
    if config.task in TEXT_TASKS:
        texts = open_text_set(config)
        masks.check(texts.complete)
        grounder = open_grounder(config, bundle)
        ask = _narratives if config.task == "narrative" else _references
        records = []
        for chunk in _chunks([texts.images[index] for index, _ in images], config.batch_size):
            scenes = look(grounder, masks, [image.record for image in chunk])
            try:
                records += ask(config, grounder, texts.kind, list(zip(chunk, scenes, strict=True)))
            except ValueError as error:  # a text that the model cannot take
                names = ", ".join(image.record.name for image in chunk)
                raise EvaluationError(f"{config.captions}, texts of {names}: {error}") from error
            advance(len(chunk))
        return records if jax.process_index() == 0 else []
    source = open_source(SourceConfig(_READERS[config.task], config.annotations, config.images, config.masks))
    rows = {source[row].image_id: row for row in range(len(source))}
    grounder = open_grounder(config, bundle)
    write = (_panoptic if config.task == "panoptic" else _instances)(config, grounder, out)
    records = []
    for chunk in _chunks([source[rows[uid]] for uid, _ in images if uid in rows], config.batch_size):
        records += write(list(zip(chunk, look(grounder, masks, chunk), strict=True)))
        advance(len(chunk))
    records = records if jax.process_index() == 0 else []
    return {"annotations": records} if config.task == "panoptic" else records


def open_grounder(config: EvalConfig, bundle: Bundle) -> Grounder:
    """The model as the evaluation wants it."""
    return Grounder.from_bundle(
        bundle,
        tokenizer=config.tokenizer or None,
        conversation=config.conversation or None,
        prompts=config.prompts or None,
        rules=read_rules(config.rules, "--config.rules"),
        nouns=config.nouns or None,
        batch_size=config.batch_size,
    )


class InputMasks:
    """The entities that text is grounded in: annotated ones, a segmenter's, or those of files.

    Raises:
        EvaluationError: neither of them.
    """

    def __init__(self, config: EvalConfig):
        self._config, self._predictor = config, None
        choice = config.input_masks
        if choice == "segmenter":
            self._predictor = Predictor.from_checkpoint(config.segmenter or None)
        elif choice != "ground_truth" and not Path(choice).exists():
            raise EvaluationError(
                f"input_masks is {choice!r}; choose ground_truth, segmenter, or a COCO file or folder of masks"
            )

    def check(self, complete: bool) -> None:
        """Refuses the annotated masks where they are but the answers."""
        if self._config.input_masks == "ground_truth" and not complete:
            raise EvaluationError(
                f"{self._config.captions} annotates only what is asked for; ground text in masks of everything: "
                "--config.input_masks=segmenter, or a folder of masks"
            )

    def __call__(self, record: Record, pixels: np.ndarray, max_entities: int) -> EntityMasks | None:
        """Disjoint entities of an image; None when there is none."""
        try:
            if self._predictor is not None:
                kept = self._predictor(pixels).above(self._config.mask_threshold)
                return EntityMasks.from_prediction(kept, max_entities) if len(kept) else None
            if self._config.input_masks == "ground_truth":
                return disjoint_masks(_annotated(record), overlap="area", max_entities=max_entities)
            name = Path(record.name)
            file = mask_file_of(self._config.input_masks, name.stem)
            return disjoint_masks(read_masks(file, pixels.shape[:2], name.name), max_entities=max_entities)
        except NoMasksError:
            return None


def _annotated(record: Record) -> MaskSet:
    """The annotated entities without crowds."""
    entities = record.load_entities()
    table = np.arange(len(entities.labels) + 1)
    table[1:][entities.crowd] = 0
    return MaskSet([table[layer] for layer in entities.layers], entities.ids)


def look(grounder: Grounder, masks: InputMasks, records: Sequence[Record]) -> list[Scene | None]:
    """Scenes of images; None for one without entities, about which every answer is "not found"."""
    pixels = [record.load_image() for record in records]
    found = [masks(*pair, grounder.max_entities) for pair in zip(records, pixels, strict=True)]
    kept = [row for row, entities in enumerate(found) if entities is not None]
    seen = grounder.look([pixels[row] for row in kept], [found[row] for row in kept])
    scenes = dict(zip(kept, seen, strict=True))
    return [scenes.get(row) for row in range(len(records))]


Looked = list[tuple[TextImage, Scene | None]]


def _narratives(config: EvalConfig, grounder: Grounder, kind: str, images: Looked) -> list[dict[str, Any]]:
    asked = [(uid, narrative, scene) for image, scene in images for uid, narrative in image.texts]
    seen = [(narrative, scene) for _, narrative, scene in asked if scene is not None]
    narratives, scenes = ([pair[column] for pair in seen] for column in (0, 1))
    forced = config.phrases == "forced"
    wanted = [linked_phrases(narrative) for narrative in narratives]
    results = iter(
        grounder.ground(
            scenes,
            [narrative.caption for narrative in narratives],
            [[phrase.text for phrase in phrases] for phrases in wanted] if forced else None,
            [[phrase.plural for phrase in phrases] for phrases in wanted] if forced else None,
        )
    )
    records = []
    for uid, narrative, scene in asked:
        if scene is None:
            count = len(linked_phrases(narrative)) if forced else 0
            size = (narrative.record.height, narrative.record.width)
            records.append({"image_id": uid, "phrases": [{"pred": blank(size)}] * count})
            continue
        result = next(results)
        record = grounding_files.phrase_record(uid, result)
        if not forced:  # only what was found counts as named
            named = zip(record["phrases"], result.phrases, strict=True)
            record["phrases"] = [{**entry, "text": phrase.text} for entry, phrase in named if phrase.found]
        records.append(record)
    return records


def _references(config: EvalConfig, grounder: Grounder, kind: str, images: Looked) -> list[dict[str, Any]]:
    asked = [(uid, narrative, scene) for image, scene in images for uid, narrative in image.texts]
    scenes = [scene for *_, scene in asked if scene is not None]
    texts = [narrative.caption for _, narrative, scene in asked if scene is not None]
    if kind == "question":
        results = iter(grounder.reason(scenes, texts, forced=config.phrases == "forced"))
    else:
        results = iter(grounder.refer(scenes, texts))
    records = []
    for uid, narrative, scene in asked:
        if scene is None:
            size = (narrative.record.height, narrative.record.width)
            records.append({"image_id": uid, "items": [{"pred": blank(size)}]})
        else:
            records.append(grounding_files.referring_record(uid, [next(results)]))
    return records


def _panoptic(config: EvalConfig, grounder: Grounder, out: Path) -> Callable:
    categories = _categories(config)
    # All processes have all results; the files of the first one count.
    folder = out / ("predictions" if jax.process_index() == 0 else f"predictions.{jax.process_index()}")
    folder.mkdir(exist_ok=True)
    names = [category["name"] for category in categories]
    things = [bool(category.get("isthing", 1)) for category in categories]
    ids = [category["id"] for category in categories]

    def write(images: list[tuple[Record, Scene | None]]) -> list[dict[str, Any]]:
        results = iter(grounder.panoptic([scene for _, scene in images if scene is not None], names, things))
        records = []
        for record, scene in images:
            stem = Path(record.name).stem
            if scene is not None:
                records.append(grounding_files.panoptic_record(folder, record.image_id, stem, next(results), ids))
                continue
            Image.new("RGB", (record.width, record.height)).save(folder / f"{stem}.png")
            records.append({"image_id": record.image_id, "file_name": f"{stem}.png", "segments_info": []})
        return records

    return write


def _instances(config: EvalConfig, grounder: Grounder, out: Path) -> Callable:
    categories = _categories(config)
    names, ids = ([category[key] for category in categories] for key in ("name", "id"))

    def write(images: list[tuple[Record, Scene | None]]) -> list[dict[str, Any]]:
        seen = [(record, scene) for record, scene in images if scene is not None]
        results = grounder.instances([scene for _, scene in seen], names)
        pairs = zip(seen, results, strict=True)
        return [
            entry
            for (record, _), result in pairs
            for entry in grounding_files.instance_records(record.image_id, result, ids)
        ]

    return write


def _categories(config: EvalConfig) -> list[dict[str, Any]]:
    categories = formats.CocoAnnotations.load(config.annotations).categories
    for category in categories:
        formats.field(category, "name", f"{config.annotations}, category {category.get('id')}")
    return sorted(categories, key=lambda category: category["id"])


def _chunks(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]
