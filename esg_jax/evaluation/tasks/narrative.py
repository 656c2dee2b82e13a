"""Panoptic narrative grounding: average recall, and which nouns a model names by itself."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from esg_jax.evaluation.formats.coco import add_instances
from esg_jax.evaluation.formats.phrases import records_by_image
from esg_jax.evaluation.metrics.grounding import text_recall
from esg_jax.evaluation.metrics.grounding.phrase_grounding import PhraseGrounding
from esg_jax.evaluation.tasks.task import Truth
from esg_jax.evaluation.tasks.text_task import TextTask, blank, linked_phrases
from esg_jax.evaluation.workers import accumulate


@dataclasses.dataclass(frozen=True)
class NarrativeTask(TextTask):
    """PNG AR of GELLA. "generated" `phrases` are aligned with the annotated ones by head nouns, and give AR_text.

    soft: the 2021 protocol.
    """

    name: ClassVar[str] = "narrative"
    kinds: ClassVar[tuple[str, ...]] = ("caption",)
    records: ClassVar[str] = "phrases"

    soft: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        more = ("AR_text_strict", "AR_text_loose") if self.phrases == "generated" else ()
        return ("AR", "AR_Th", "AR_St", "AR_Sing", "AR_Pl", "acc@0.5", *more)

    def answer(self, grounder, kind, narratives, scenes):
        captions = [narrative.caption for narrative in narratives]
        if self.phrases == "generated":  # only what was found counts as named
            results = grounder.ground(scenes, captions)
            return [
                [{"pred": result.scene.rle(p.entities), "text": p.text} for p in result.phrases if p.found]
                for result in results
            ]
        wanted = [linked_phrases(narrative) for narrative in narratives]
        given = ([[getattr(phrase, name) for phrase in phrases] for phrases in wanted] for name in ("text", "plural"))
        results = grounder.ground(scenes, captions, *given)
        return [[{"pred": result.scene.rle(p.entities)} for p in result.phrases] for result in results]

    def unanswered(self, narrative):
        count = len(linked_phrases(narrative)) if self.phrases == "forced" else 0
        return [blank((narrative.record.height, narrative.record.width))] * count

    def aligned(self, targets, answers):
        """The listed phrase that names each annotated one; those that were not listed get an empty mask."""
        if self.phrases == "forced":
            return answers
        out = {}
        for uid, wanted in targets.items():
            listed = answers[uid]
            found = text_recall.align([phrase["text"] for phrase in listed], [phrase["text"] for phrase in wanted])
            out[uid] = [
                blank(target["gt"]["size"]) if index is None else {"pred": listed[index]["pred"]}
                for target, index in zip(wanted, found, strict=True)
            ]
        return out

    def score(self, truth: Truth, files: Sequence[Path], *, workers: int = 1) -> dict[str, Any]:
        answers = records_by_image(files, self.records)
        items = self.pairs(truth.content, answers, files)
        metric = PhraseGrounding(soft=self.soft)
        result = accumulate(metric, items, add_instances, workers=workers, description="PNG AR").result()
        if self.phrases == "generated":
            recall = text_recall.TextRecall()
            for uid, phrases in items:
                recall.add(uid, [phrase["text"] for phrase in answers[uid]], [phrase["text"] for phrase in phrases])
            result |= {name: value for name, value in recall.result().items() if name.startswith("AR_text")}
        return {"metrics": result}
