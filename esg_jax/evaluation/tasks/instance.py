"""Instances of known classes: mask AP."""

import dataclasses
from typing import Any, ClassVar

import jax

from esg_jax.evaluation.metrics.accumulator import Accumulator
from esg_jax.evaluation.metrics.images.average_precision import AveragePrecision
from esg_jax.evaluation.tasks.grounder_task import GrounderTask
from esg_jax.evaluation.tasks.predictor_task import PredictorTask
from esg_jax.evaluation.tasks.results_task import ResultsTask, ordered_records, result_records
from esg_jax.evaluation.tasks.task import ModelRun, Truth
from esg_jax.inference.grounding.grounding_files import instance_records


@dataclasses.dataclass(frozen=True)
class InstanceTask(ResultsTask, PredictorTask, GrounderTask):
    """Mask AP of Mask2Former, or of GELLA by the names of the categories."""

    name: ClassVar[str] = "instance"
    columns: ClassVar[tuple[str, ...]] = ("AP", "AP50", "AP75", "APs", "APm", "APl")

    def metrics(self, truth: Truth) -> list[Accumulator]:
        return [AveragePrecision(categories=truth.content.category_ids())]

    def predict(self, truth: Truth, run: ModelRun) -> list[dict[str, Any]]:
        ids = [category["id"] for category in self.categories(truth)]
        if not run.bundle.system.grounds_text:
            return ordered_records(
                (
                    index,
                    result_records(truth.images[index][0], found.rles, found.scores, [ids[k] for k in found.labels]),
                )
                for index, found in self.predictions(self.predictor(run.bundle), truth, run, output="instances")
            )
        grounder, names = self.grounder(run.bundle), self.category_names(self.categories(truth))
        records: list[dict[str, Any]] = []
        for seen in self.scenes_of(grounder, "coco_instances", truth, run):
            seen = [(record, scene) for record, scene in seen if scene is not None]
            results = grounder.instances([scene for _, scene in seen], names)
            for (record, _), result in zip(seen, results, strict=True):
                records += instance_records(record.image_id, result, ids)
        return records if jax.process_index() == 0 else []
