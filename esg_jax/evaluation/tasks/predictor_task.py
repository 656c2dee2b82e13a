"""What the tasks of CropFormer and Mask2Former share."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from esg_jax.evaluation.tasks.task import EvalTask, ModelRun, Truth, is_own
from esg_jax.inference.bundle import Bundle
from esg_jax.inference.entities.predictor import Predictor


@dataclasses.dataclass(frozen=True)
class PredictorTask(EvalTask):
    """min_size, max_size: shortest and longest edge of every view, or 0: as the checkpoint says, else 800 and 1333.

    batch_size: images per call of the network.
    """

    min_size: int = 0
    max_size: int = 0
    batch_size: int = 1

    def predictor(self, bundle: Bundle, **options: Any) -> Predictor:
        """The model.

        Raises:
            ValueError: the weights are those of a system that finds no entities.
        """
        sizes = {"min_size": self.min_size or None, "max_size": self.max_size or None}
        return bundle.system.predictor(bundle, **{"views": 1, **sizes, **options})

    def predictions(
        self, predictor: Predictor, truth: Truth, run: ModelRun, **options: Any
    ) -> Iterator[tuple[int, Any]]:
        """(place in `truth.images`, prediction) of the images that this process writes, in any order.

        Args:
            predictor, truth, run: of the task.
            options: of `Predictor.predict_many`.
        """
        paths = [path for _, path in truth.images]
        for index, found in predictor.predict_many(paths, batch_size=self.batch_size, **options):
            if isinstance(found, Exception):
                raise found  # a score over fewer images would not compare
            if is_own(index):
                yield index, found
            run.advance(1)
