"""Referring and reasoning segmentation: cIoU, gIoU and answers to expressions that mean nothing."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from esg_jax.evaluation.formats.coco import add_instances
from esg_jax.evaluation.formats.phrases import records_by_image
from esg_jax.evaluation.metrics.grounding.referring_segmentation import ReferringSegmentation
from esg_jax.evaluation.tasks.task import Truth
from esg_jax.evaluation.tasks.text_task import TextTask, blank
from esg_jax.evaluation.workers import accumulate


@dataclasses.dataclass(frozen=True)
class ReferringTask(TextTask):
    """One mask per expression or question; "generated" `phrases` let GELLA answer questions in its own words."""

    name: ClassVar[str] = "referring"
    columns: ClassVar[tuple[str, ...]] = ("cIoU", "gIoU", "mIoU", "P@0.5", "N-acc", "T-acc")
    kinds: ClassVar[tuple[str, ...]] = ("expression", "question")
    records: ClassVar[str] = "items"

    def answer(self, grounder, kind, narratives, scenes):
        texts = [narrative.caption for narrative in narratives]
        if kind == "question":
            results = grounder.reason(scenes, texts, forced=self.phrases == "forced")
        else:
            results = grounder.refer(scenes, texts)
        return [[{"pred": result.scene.rle(result.phrases[0].entities)}] for result in results]

    def unanswered(self, narrative):
        return [blank((narrative.record.height, narrative.record.width))]

    def score(self, truth: Truth, files: Sequence[Path], *, workers: int = 1) -> dict[str, Any]:
        items = self.pairs(truth.content, records_by_image(files, self.records), files)
        metric = accumulate(ReferringSegmentation(), items, add_instances, workers=workers, description="cIoU / gIoU")
        return {"metrics": metric.result()}
