"""Panoptic segmentation: PQ."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from esg_jax.evaluation.formats.files import load_json, read_image
from esg_jax.evaluation.formats.label_maps import panoptic_quality
from esg_jax.evaluation.tasks.grounder_task import GrounderTask
from esg_jax.evaluation.tasks.predictor_task import PredictorTask
from esg_jax.evaluation.tasks.results_task import CocoTask
from esg_jax.evaluation.tasks.task import ModelRun, Truth
from esg_jax.inference.grounding.grounding_files import panoptic_record
from esg_jax.input.image_io import load_image
from esg_jax.masks.read import ids_from_rgb
from esg_jax.masks.write import write_id_png
from esg_jax.viz import GridRow


@dataclasses.dataclass(frozen=True)
class PanopticTask(CocoTask, PredictorTask, GrounderTask):
    """PQ of Mask2Former, or of GELLA by the names of the categories. Predicted PNGs lie beside the JSON.

    masks: folder of the ground-truth PNGs; default: named like `annotations`.
    """

    name: ClassVar[str] = "panoptic"
    columns: ClassVar[tuple[str, ...]] = ("PQ", "SQ", "RQ", "PQ_Th", "PQ_St")

    masks: str = ""

    def predict(self, truth: Truth, run: ModelRun) -> dict[str, Any]:
        categories = self.categories(truth)
        ids = [category["id"] for category in categories]
        things = tuple(bool(category.get("isthing", 1)) for category in categories)
        folder = run.out / "predictions"
        if not run.bundle.system.grounds_text:
            folder.mkdir(exist_ok=True)
            by_image = {}
            options = {"output": "panoptic", "is_thing": things}
            for index, found in self.predictions(self.predictor(run.bundle), truth, run, **options):
                uid, path = truth.images[index]
                segments = [{"id": s.id, "category_id": ids[s.category]} for s in found.segments]
                by_image[index] = _write(folder, uid, path.stem, np.asarray(found.segment_map), segments)
            return {"annotations": [by_image[index] for index in sorted(by_image)]}
        if jax.process_index():  # all processes have all results; the files of the first one count
            folder = run.out / f"predictions.{jax.process_index()}"
        folder.mkdir(exist_ok=True)
        grounder, names, records = self.grounder(run.bundle), self.category_names(categories), []
        for seen in self.scenes_of(grounder, "coco_panoptic", truth, run):
            results = iter(grounder.panoptic([scene for _, scene in seen if scene is not None], names, things))
            for record, scene in seen:
                uid, stem = record.image_id, Path(record.name).stem
                if scene is None:
                    records.append(_write(folder, uid, stem, np.zeros((record.height, record.width), int), []))
                else:
                    records.append(panoptic_record(folder, uid, stem, next(results), ids))
        return {"annotations": records if jax.process_index() == 0 else []}

    def score(self, truth: Truth, files: Sequence[Path], *, workers: int = 1) -> dict[str, Any]:
        metric = panoptic_quality(
            truth.content,
            files,
            gt_dir=self.masks or None,
            pred_dir=Path(files[0]).parent / "predictions",
            only=[uid for uid, _ in truth.images] if self.max_images else None,
            workers=workers,
        )
        return {"metrics": metric.result()}

    def draw(self, truth: Truth, files: Sequence[Path]) -> Iterator[GridRow]:
        records = {r["image_id"]: r for f in files for r in load_json(f)["annotations"]}
        gt = Path(self.masks) if self.masks else Path(self.annotations).with_suffix("")
        for uid, path in self.spread(truth.images):
            pred = _segments(Path(files[0]).parent / "predictions" / records[uid]["file_name"])
            target = _segments(gt / truth.content.annotations[uid][0]["file_name"])
            yield GridRow(load_image(path), pred, target, path.name)


def _write(folder: Path, image_id: Any, stem: str, ids_hw: np.ndarray, segments: list[dict]) -> dict[str, Any]:
    write_id_png(folder / f"{stem}.png", ids_hw)
    return {"image_id": image_id, "file_name": f"{stem}.png", "segments_info": segments}


def _segments(path: Path) -> np.ndarray:
    """Contiguous label map of a panoptic PNG; void stays 0."""
    ids = ids_from_rgb(read_image(path, "RGB"))
    values, labels = np.unique(ids, return_inverse=True)
    return (labels.reshape(ids.shape) + int(values[0] != 0)).astype(np.int16)
