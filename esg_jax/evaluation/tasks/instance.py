"""Instances of known classes: mask AP."""

import dataclasses
from typing import Any, ClassVar

from esg_jax.evaluation.metrics.accumulator import Accumulator
from esg_jax.evaluation.metrics.images.average_precision import AveragePrecision
from esg_jax.evaluation.tasks.grounder_task import GrounderTask, holds_gella
from esg_jax.evaluation.tasks.predictor_task import PredictorTask
from esg_jax.evaluation.tasks.results_task import ResultsTask, result_records
from esg_jax.evaluation.tasks.task import Images, ModelRun, Truth
from esg_jax.inference.grounding_writers import instance_records


@dataclasses.dataclass(frozen=True)
class InstanceTask(ResultsTask, PredictorTask, GrounderTask):
    """Mask AP of Mask2Former, or of GELLA by the names of the categories."""

    name: ClassVar[str] = "instance"
    columns: ClassVar[tuple[str, ...]] = ("AP", "AP50", "AP75", "APs", "APm", "APl")

    def metrics(self, truth: Truth) -> list[Accumulator]:
        return [AveragePrecision(categories=truth.content.category_ids())]

    def predict(self, truth: Truth, images: Images, run: ModelRun) -> list[dict[str, Any]]:
        ids = [category["id"] for category in self.categories(truth)]
        records: list[dict[str, Any]] = []
        if not holds_gella(run.weights):
            predictor = self.predictor(run)
            for uid, path in images:
                found = predictor.predict_instances(path)
                records += result_records(uid, found.rles, found.scores, [ids[label] for label in found.labels])
                run.advance(1)
            return records
        grounder, names = self.grounder(run), self.category_names(self.categories(truth))
        for seen in self.scenes_of(grounder, "coco_instances", images, run):
            seen = [(record, scene) for record, scene in seen if scene is not None]
            results = grounder.instances([scene for _, scene in seen], names)
            for (record, _), result in zip(seen, results, strict=True):
                records += instance_records(record.image_id, result, ids)
        return records
