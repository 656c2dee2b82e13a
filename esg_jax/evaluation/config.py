"""What an evaluation run needs to know; `configs/recipes` fills it in, the command line overrides it."""

import dataclasses

from esg_jax.evaluation.rle import EvaluationError

TASKS = ("entity", "instance", "panoptic", "semantic", "reconstruction")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """One model evaluation.

    task: which head and metric: "entity" (AP^e), "instance" (mask AP), "panoptic" (PQ), "semantic" (mIoU),
        "reconstruction" (class-agnostic AP of the annotated masks after GELLA's vision branch).
    annotations: COCO JSON of the ground truth; for "semantic" a text file with lines ``image label_map``.
    images: folder that image names are relative to.
    masks: folder of ground-truth PNGs (panoptic, semantic); default: named like `annotations`.
    group_by: field of the image records; scores are also given per value of it.
    views: 5 (whole image and corner crops), 1, or 0: what the model was made for.
    min_size, max_size: shortest and longest edge of every view, or 0: as the checkpoint says, else 800 and 1333.
    score_mode: see `esg_jax.inference.scores.ScoreMode`.
    batch_size: images per call of the network.
    num_classes, ignore_label: of semantic label maps.
    max_images: only the first so many images, for a quick look; 0 = all.
    grid_images: images in the picture grid.
    draw_threshold: least score of the masks drawn there.
    """

    task: str = "entity"
    annotations: str = ""
    images: str = ""
    masks: str = ""
    group_by: str = ""
    views: int = 0
    min_size: int = 0
    max_size: int = 0
    score_mode: str = "reference"
    batch_size: int = 1
    num_classes: int = 0
    ignore_label: int = 255
    max_images: int = 0
    grid_images: int = 8
    draw_threshold: float = 0.3

    def __post_init__(self):
        if self.task not in TASKS:
            raise EvaluationError(f"task is {self.task!r}; choose one of {', '.join(TASKS)}")
        if not self.annotations:
            raise EvaluationError("no annotations given; set --config.annotations=FILE (and --config.images=FOLDER)")
        if self.task == "semantic" and self.num_classes < 1:
            raise EvaluationError("task 'semantic' needs num_classes")
