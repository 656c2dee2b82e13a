"""Entities: class-agnostic AP^e and best overlap."""

import dataclasses
from typing import Any, ClassVar

from esg_jax.evaluation.metrics.accumulator import Accumulator
from esg_jax.evaluation.metrics.images.average_precision import EntityAP
from esg_jax.evaluation.metrics.images.best_overlap import BestOverlap
from esg_jax.evaluation.tasks.predictor_task import PredictorTask
from esg_jax.evaluation.tasks.results_task import ResultsTask, result_records
from esg_jax.evaluation.tasks.task import Images, ModelRun, Truth


@dataclasses.dataclass(frozen=True)
class EntityTask(ResultsTask, PredictorTask):
    """AP^e of CropFormer or Mask2Former.

    views: 5 (whole image and corner crops), 1, or 0: what the model was made for.
    score_mode: see `esg_jax.inference.scores.ScoreMode`.
    batch_size: images per call of the network.
    """

    name: ClassVar[str] = "entity"
    columns: ClassVar[tuple[str, ...]] = (
        *("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100", "AR@100@IoU0.5"),
        *("mean_best_iou", "recall@IoU0.5"),
    )

    views: int = 0
    score_mode: str = "reference"
    batch_size: int = 1

    def metrics(self, truth: Truth) -> list[Accumulator]:
        return [EntityAP(), BestOverlap()]

    def predict(self, truth: Truth, images: Images, run: ModelRun) -> list[dict[str, Any]]:
        """Every query of every image: the metric wants the empty and unlikely ones too."""
        predictor = self.predictor(run, views=self.views or None, score_mode=self.score_mode)
        by_image = {}
        for index, found in predictor.predict_many([path for _, path in images], batch_size=self.batch_size):
            if isinstance(found, Exception):
                raise found  # a score over fewer images would not compare
            by_image[index] = result_records(images[index][0], found.rles(), found.scores, [1] * len(found))
            run.advance(1)
        return [record for index in sorted(by_image) for record in by_image[index]]
