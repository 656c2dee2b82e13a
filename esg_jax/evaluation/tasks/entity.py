"""Entities: class-agnostic AP^e and best overlap."""

import dataclasses
from typing import Any, ClassVar

from esg_jax.evaluation.metrics.accumulator import Accumulator
from esg_jax.evaluation.metrics.images.average_precision import EntityAP
from esg_jax.evaluation.metrics.images.best_overlap import BestOverlap
from esg_jax.evaluation.tasks.predictor_task import PredictorTask
from esg_jax.evaluation.tasks.results_task import ResultsTask, ordered_records, result_records
from esg_jax.evaluation.tasks.task import ModelRun, Truth


@dataclasses.dataclass(frozen=True)
class EntityTask(ResultsTask, PredictorTask):
    """AP^e of CropFormer or Mask2Former.

    views: 5 (whole image and corner crops), 1, or 0: what the model was made for.
    score_mode: see `esg_jax.inference.entities.scores.ScoreMode`.
    """

    name: ClassVar[str] = "entity"
    columns: ClassVar[tuple[str, ...]] = (
        *("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100", "AR@100@IoU0.5"),
        *("mean_best_iou", "recall@IoU0.5"),
    )

    views: int = 0
    score_mode: str = "reference"

    def metrics(self, truth: Truth) -> list[Accumulator]:
        return [EntityAP(), BestOverlap()]

    def predict(self, truth: Truth, run: ModelRun) -> list[dict[str, Any]]:
        """Every query of every image: the metric wants the empty and unlikely ones too."""
        predictor = self.predictor(run.bundle, views=self.views or None, score_mode=self.score_mode)
        return ordered_records(
            (index, result_records(truth.images[index][0], found.rles(), found.scores, [1] * len(found)))
            for index, found in self.predictions(predictor, truth, run)
        )
