"""Reconstruction: class-agnostic AP of the annotated masks after GELLA's vision branch (ESG, Table 16)."""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from esg_jax.evaluation.metrics.accumulator import Accumulator
from esg_jax.evaluation.metrics.images.average_precision import EntityAP
from esg_jax.evaluation.metrics.images.best_overlap import BestOverlap
from esg_jax.evaluation.tasks.results_task import ResultsTask, result_records
from esg_jax.evaluation.tasks.task import ModelRun, Truth, is_own
from esg_jax.input.readers import SourceConfig, open_source
from esg_jax.masks import rle


@dataclasses.dataclass(frozen=True)
class ReconstructionTask(ResultsTask):
    """AP of every query's mask."""

    name: ClassVar[str] = "reconstruction"
    columns: ClassVar[tuple[str, ...]] = ("AP", "AP50", "AP75", "APs", "APm", "APl", "mean_best_iou")

    def metrics(self, truth: Truth) -> list[Accumulator]:
        return [EntityAP(), BestOverlap()]

    def predict(self, truth: Truth, run: ModelRun) -> list[dict[str, Any]]:
        reconstruct = run.bundle.system.reconstructor(run.bundle)
        source = open_source(SourceConfig(annotations=self.annotations, images=self.images))
        wanted, records = {uid for uid, _ in truth.images}, []
        asked = [record for row in range(len(source)) if (record := source[row]).image_id in wanted]
        found = reconstruct.many((record.load_image(), record.load_entities()) for record in asked)
        for index, (record, (masks, scores)) in enumerate(zip(asked, found, strict=True)):
            if is_own(index):
                shown = np.flatnonzero(masks.any((1, 2)))
                records += result_records(record.image_id, rle.encode(masks[shown]), scores[shown], [1] * len(shown))
            run.advance(1)
        return records
