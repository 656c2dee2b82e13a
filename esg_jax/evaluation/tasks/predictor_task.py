"""What the tasks of CropFormer and Mask2Former share."""

import dataclasses
from typing import Any

import jax

from esg_jax.evaluation.metrics.errors import EvaluationError
from esg_jax.evaluation.tasks.grounder_task import holds_gella
from esg_jax.evaluation.tasks.task import EvalTask, ModelRun
from esg_jax.inference.predictor import Predictor


@dataclasses.dataclass(frozen=True)
class PredictorTask(EvalTask):
    """min_size, max_size: shortest and longest edge of every view, or 0: as the checkpoint says, else 800 and 1333."""

    min_size: int = 0
    max_size: int = 0

    def predictor(self, run: ModelRun, **options: Any) -> Predictor:
        """The model, on one device.

        Raises:
            EvaluationError: the weights are GELLA's.
        """
        if holds_gella(run.weights):
            raise EvaluationError(f"{run.weights} holds a GELLA, which does no task {self.name!r}")
        sizes = {"min_size": self.min_size or None, "max_size": self.max_size or None}
        device = jax.local_devices()[:1]
        return Predictor.from_checkpoint(
            run.weights, dtype=run.dtype, devices=device, **{"views": 1, **sizes, **options}
        )
