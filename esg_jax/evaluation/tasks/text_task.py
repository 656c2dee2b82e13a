"""What the tasks of text share: questions and their answers from the official files, and pictures."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from esg_jax.evaluation.formats.phrases import pair, records_by_image
from esg_jax.evaluation.metrics.errors import EvaluationError
from esg_jax.evaluation.tasks.grounder_task import GrounderTask, chunks
from esg_jax.evaluation.tasks.results_task import paint
from esg_jax.evaluation.tasks.task import ModelRun, Truth, check_choice
from esg_jax.inference.grounding.grounder import Grounder
from esg_jax.inference.grounding.results import Scene
from esg_jax.input.grounding_readers import open_narratives
from esg_jax.input.image_io import load_image
from esg_jax.input.narratives import GroundingSourceConfig, Narrative, Narratives, Phrase
from esg_jax.input.records import Record
from esg_jax.masks import rle
from esg_jax.viz import GridRow


@dataclasses.dataclass(frozen=True)
class TextImage:
    """One image, and everything that is asked about it: unique id and text."""

    record: Record
    texts: tuple[tuple[str, Narrative], ...]


@dataclasses.dataclass(frozen=True)
class TextSet:
    """All images of an evaluation, and where their texts come from."""

    images: list[TextImage]
    source: Narratives


@dataclasses.dataclass(frozen=True)
class TextTask(GrounderTask):
    """Text linked to masks.

    reader, captions, split: of the text; with `annotations`, `images` and `masks` (folder of the ground-truth PNGs) see
        `input.narratives.GroundingSourceConfig`.
    phrases: "forced" gives GELLA what it is asked for; "generated" lets it say so itself.
    plural_by: phrases count as plural when they have several "segments" (as first published) or by their "flag".
    """

    kinds: ClassVar[tuple[str, ...]]  # of text: "caption", "expression", "question"
    records: ClassVar[str]  # what a record of a file of answers holds a list of

    masks: str = ""
    reader: str = ""
    captions: str = ""
    split: str = ""
    phrases: str = "forced"
    plural_by: str = "segments"

    def __post_init__(self) -> None:
        check_choice(self, "phrases", ("forced", "generated"))
        check_choice(self, "plural_by", ("segments", "flag"))
        if not (self.reader and self.captions):
            raise EvaluationError(
                f"task {self.name!r} needs --config.reader=NAME and --config.captions=FILE (see configs/recipes)"
            )

    @property
    def file(self) -> str:
        return self.captions

    def answer(
        self, grounder: Grounder, kind: str, narratives: Sequence[Narrative], scenes: Sequence[Scene]
    ) -> list[list[dict[str, Any]]]:
        """What the model says to every text: entries with `pred` (RLE)."""
        raise NotImplementedError

    def unanswered(self, narrative: Narrative) -> list[dict[str, Any]]:
        """The entries of a text in whose image there is no entity."""
        raise NotImplementedError

    def truth(self) -> Truth:
        """Reads what is asked; captions without a linked phrase are left out. An image's id is its place.

        Raises:
            ValueError, FileNotFoundError: as `open_narratives`; texts that the task does not fit.
        """
        fields = ("reader", "captions", "annotations", "images", "masks", "split")
        narratives = open_narratives(GroundingSourceConfig(**{name: getattr(self, name) for name in fields}))
        if narratives.kind not in self.kinds:
            allowed = " and ".join(f"{kind}s" for kind in self.kinds)
            raise EvaluationError(
                f"reader {self.reader!r} gives {narratives.kind}s; task {self.name!r} is for {allowed}"
            )
        groups: dict[int, list[int]] = {}
        for row in np.flatnonzero(narratives.num_linked > 0).tolist():
            groups.setdefault(int(narratives.image_rows[row]), []).append(row)
        images, seen = [], set()
        for rows in list(groups.values())[: self.max_images or None]:
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
            raise EvaluationError(f"{self.captions} has no phrase that is linked to a mask")
        paths = [(number, image.record.image) for number, image in enumerate(images)]
        return Truth(paths, TextSet(images, narratives))

    def predict(self, truth: Truth, run: ModelRun) -> list[dict[str, Any]]:
        texts: TextSet = truth.content
        masks = self.input_entities()
        masks.check(texts.source.complete, self.captions)
        grounder, records = self.grounder(run.bundle), []
        for chunk in chunks(texts.images, self.batch_size):
            scenes = masks.scenes(grounder, [image.record for image in chunk])
            pairs = zip(chunk, scenes, strict=True)
            asked = [(uid, narrative, scene) for image, scene in pairs for uid, narrative in image.texts]
            seen = [(narrative, scene) for _, narrative, scene in asked if scene is not None]
            try:
                found = iter(
                    self.answer(grounder, texts.source.kind, *map(list, zip(*seen, strict=True))) if seen else []
                )
            except ValueError as error:  # a text that the model cannot take
                names = ", ".join(image.record.name for image in chunk)
                raise EvaluationError(f"{self.captions}, texts of {names}: {error}") from error
            for uid, narrative, scene in asked:
                entries = self.unanswered(narrative) if scene is None else next(found)
                records.append({"image_id": uid, self.records: entries})
            run.advance(len(chunk))
        return records if jax.process_index() == 0 else []

    def targets(self, texts: TextSet) -> dict[str, list[dict[str, Any]]]:
        """Per text, `gt` (RLE) of every scored phrase with `text`, `plural`, `isthing`, and perhaps `ignore` (RLE)."""
        out: dict[str, list[dict[str, Any]]] = {}
        things = texts.source.is_thing
        for image in texts.images:
            entities, ignored = image.record.load_entities(), image.record.load_ignore()
            more = {} if ignored is None else {"ignore": _encode(ignored)}
            for uid, narrative in image.texts:
                out[uid] = []
                for phrase in linked_phrases(narrative):
                    mask = entities.union(phrase.entities)
                    # As first published, the last segment of a phrase says whether it is a thing.
                    thing = things[entities.labels[phrase.entities[-1]]] if things else True
                    plural = len(phrase.entities) > 1 if self.plural_by == "segments" else phrase.plural
                    entry = {"gt": _encode(mask), "text": phrase.text, "plural": plural, "isthing": thing, **more}
                    out[uid].append(entry)
        return out

    def aligned(
        self, targets: dict[str, list[dict[str, Any]]], answers: dict[str, list[dict[str, Any]]]
    ) -> dict[str, list[dict[str, Any]]]:
        """The answers in the order of the targets."""
        return answers

    def pairs(
        self, texts: TextSet, answers: dict[str, list[dict[str, Any]]], files: Sequence[Path]
    ) -> list[tuple[str, list[dict[str, Any]]]]:
        """(id, scored phrases with `gt` and `pred`) of every text.

        Raises:
            EvaluationError: predictions of other texts than the ground truth has, or too few of one.
        """
        targets = self.targets(texts)
        paired = self.aligned(targets, answers) if set(targets) == set(answers) else answers
        return pair(targets, paired, self.records, self.captions, ", ".join(map(str, files)))

    def draw(self, truth: Truth, files: Sequence[Path]) -> Iterator[GridRow]:
        texts, answers = truth.content, records_by_image(files, self.records)
        asked = [(image.record, uid, narrative) for image in texts.images for uid, narrative in image.texts]
        for record, uid, narrative in self.spread(asked):
            alone = dataclasses.replace(texts, images=[TextImage(record, ((uid, narrative),))])
            ((_, phrases),) = self.pairs(alone, {uid: answers[uid]}, files)
            size = (record.height, record.width)
            pred, target = (paint(phrases, size, f"text {uid}", role) for role in ("pred", "gt"))
            yield GridRow(load_image(record.image), pred, target, narrative.caption[:80])


def linked_phrases(narrative: Narrative) -> list[Phrase]:
    """The phrases that an answer is scored for."""
    return [phrase for phrase in narrative.phrases if phrase.entities or narrative.kind == "question"]


def blank(size: Sequence[int]) -> dict[str, Any]:
    """The entry of a mask that was not found."""
    return {"pred": rle.to_json(rle.empty(size))}


def _encode(mask: np.ndarray) -> dict[str, Any]:
    return rle.to_json(rle.encode(mask[None])[0])
