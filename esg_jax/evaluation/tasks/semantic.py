"""Semantic segmentation: mean IoU."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from esg_jax.evaluation.formats.files import read_image
from esg_jax.evaluation.formats.label_maps import add_label_map
from esg_jax.evaluation.metrics.errors import EvaluationError
from esg_jax.evaluation.metrics.images.mean_iou import SemanticIoU
from esg_jax.evaluation.tasks.predictor_task import PredictorTask
from esg_jax.evaluation.tasks.task import ModelRun, Truth
from esg_jax.evaluation.workers import accumulate
from esg_jax.input.image_io import load_image
from esg_jax.masks import BACKGROUND
from esg_jax.viz import GridRow


@dataclasses.dataclass(frozen=True)
class SemanticTask(PredictorTask):
    """mIoU of Mask2Former. Image ids are the names of the label maps; predicted ones lie beside the JSON.

    annotations: text file with lines ``image label_map``.
    masks: folder of the ground-truth PNGs; default: named like `annotations`.
    num_classes, ignore_label: of the label maps.
    """

    name: ClassVar[str] = "semantic"
    columns: ClassVar[tuple[str, ...]] = ("mIoU", "mIoU_with_predicted_only", "fwIoU", "mACC", "pACC")

    masks: str = ""
    num_classes: int = 0
    ignore_label: int = 255

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_classes < 1:
            raise EvaluationError("task 'semantic' needs num_classes")

    def truth(self) -> Truth:
        if not Path(self.annotations).is_file():
            raise EvaluationError(f"no such file: {self.annotations}")
        lines = [line.split() for line in Path(self.annotations).read_text().splitlines() if line.strip()]
        images = [(masks, Path(self.images) / image) for image, masks in lines]
        return Truth(images[: self.max_images or None])

    def predict(self, truth: Truth, run: ModelRun) -> list[str]:
        names = []
        for index, labels in self.predictions(self.predictor(run.bundle), truth, run, output="semantic"):
            file = run.out / "predictions" / truth.images[index][0]
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(labels.astype(np.uint8)).save(file)
            names.append(truth.images[index][0])
        return sorted(names)

    def _folders(self, files: Sequence[Path]) -> tuple[Path, Path]:
        gt = Path(self.masks) if self.masks else Path(self.annotations).with_suffix("")
        return gt, Path(files[0]).parent / "predictions"

    def score(self, truth: Truth, files: Sequence[Path], *, workers: int = 1) -> dict[str, Any]:
        gt, pred = self._folders(files)
        metric = SemanticIoU(self.num_classes, ignore_label=self.ignore_label)
        items = [(name, gt / name, pred / name) for name, _ in truth.images]
        return {"metrics": accumulate(metric, items, add_label_map, workers=workers, description="mIoU").result()}

    def draw(self, truth: Truth, files: Sequence[Path]) -> Iterator[GridRow]:
        gt, pred = self._folders(files)
        for name, path in self.spread(truth.images):
            target = read_image(gt / name).astype(np.int16)
            target = np.where(target == self.ignore_label, BACKGROUND, target + 1)
            yield GridRow(load_image(path), read_image(pred / name).astype(np.int16) + 1, target, path.name)
