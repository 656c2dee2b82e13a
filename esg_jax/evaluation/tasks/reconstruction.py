"""Reconstruction: class-agnostic AP of the annotated masks after GELLA's vision branch (ESG, Table 16)."""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from esg_jax.evaluation.metrics.accumulator import Accumulator
from esg_jax.evaluation.metrics.errors import EvaluationError
from esg_jax.evaluation.metrics.images.average_precision import EntityAP
from esg_jax.evaluation.metrics.images.best_overlap import BestOverlap
from esg_jax.evaluation.tasks.results_task import ResultsTask, result_records
from esg_jax.evaluation.tasks.task import Images, ModelRun, Truth
from esg_jax.inference.reconstruction import Reconstructor
from esg_jax.input.readers import SourceConfig, open_source
from esg_jax.masks import rle
from esg_jax.models.gella import Gella
from esg_jax.weights import load_model


@dataclasses.dataclass(frozen=True)
class ReconstructionTask(ResultsTask):
    """AP of every query's mask."""

    name: ClassVar[str] = "reconstruction"
    columns: ClassVar[tuple[str, ...]] = ("AP", "AP50", "AP75", "APs", "APm", "APl", "mean_best_iou")

    def metrics(self, truth: Truth) -> list[Accumulator]:
        return [EntityAP(), BestOverlap()]

    def predict(self, truth: Truth, images: Images, run: ModelRun) -> list[dict[str, Any]]:
        model = load_model(run.weights)
        if not isinstance(model, Gella):
            raise EvaluationError(f"{run.weights} holds a {type(model).__name__}; task 'reconstruction' is GELLA's")
        reconstruct = Reconstructor(model)
        source = open_source(SourceConfig(annotations=self.annotations, images=self.images))
        wanted, records = {uid for uid, _ in images}, []
        for row in range(len(source)):
            record = source[row]
            if record.image_id not in wanted:
                continue
            masks, scores = reconstruct(record.load_image(), record.load_entities())
            found = np.flatnonzero(masks.any((1, 2)))
            records += result_records(record.image_id, rle.encode(masks[found]), scores[found], [1] * len(found))
            run.advance(1)
        return records
