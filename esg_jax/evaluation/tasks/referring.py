"""Referring and reasoning segmentation: cIoU, gIoU and answers to expressions that mean nothing."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from esg_jax.evaluation.formats.coco import add_instances
from esg_jax.evaluation.formats.phrases import records_by_image
from esg_jax.evaluation.metrics.grounding.referring_segmentation import ReferringSegmentation
from esg_jax.evaluation.tasks.task import Truth
from esg_jax.evaluation.tasks.text_task import Asked, TextTask, blank, size_of
from esg_jax.evaluation.workers import accumulate
from esg_jax.inference.grounding import Grounder
from esg_jax.inference.grounding_writers import referring_record


@dataclasses.dataclass(frozen=True)
class ReferringTask(TextTask):
    """One mask per expression or question; "generated" `phrases` let GELLA answer questions in its own words."""

    name: ClassVar[str] = "referring"
    columns: ClassVar[tuple[str, ...]] = ("cIoU", "gIoU", "mIoU", "P@0.5", "N-acc", "T-acc")
    records: ClassVar[str] = "items"

    def answer(self, grounder: Grounder, kind: str, asked: Asked) -> list[dict[str, Any]]:
        scenes = [scene for *_, scene in asked if scene is not None]
        texts = [narrative.caption for _, narrative, scene in asked if scene is not None]
        if kind == "question":
            results = iter(grounder.reason(scenes, texts, forced=self.phrases == "forced"))
        else:
            results = iter(grounder.refer(scenes, texts))
        return [
            {"image_id": uid, "items": [{"pred": blank(size_of(narrative))}]}
            if scene is None
            else referring_record(uid, [next(results)])
            for uid, narrative, scene in asked
        ]

    def score(self, truth: Truth, files: Sequence[Path], *, workers: int = 1) -> dict[str, Any]:
        items = self.pairs(truth.content, records_by_image(files, self.records), files)
        metric = ReferringSegmentation()
        return {
            "metrics": accumulate(metric, items, add_instances, workers=workers, description="cIoU / gIoU").result()
        }
