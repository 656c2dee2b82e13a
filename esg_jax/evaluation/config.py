"""What an evaluation run needs to know; `configs/recipes` fills it in, the command line overrides it."""

import dataclasses

from esg_jax.evaluation.rle import EvaluationError

TASKS = ("entity", "instance", "panoptic", "semantic", "reconstruction", "narrative", "referring")
# Tasks whose ground truth is text linked to masks, read by `input.grounding_readers`.
TEXT_TASKS = ("narrative", "referring")
_CHOICES = {"phrases": ("forced", "generated"), "plural_by": ("segments", "flag")}


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """One model evaluation.

    task: which head and metric: "entity" (AP^e), "instance" (mask AP), "panoptic" (PQ), "semantic" (mIoU),
        "reconstruction" (class-agnostic AP of the annotated masks after GELLA's vision branch), "narrative" (PNG AR,
        AR_text) and "referring" (cIoU, gIoU, P@0.5, N-acc, T-acc) of GELLA; its weights also do "panoptic" and
        "instance", by the names of the categories.
    annotations: COCO JSON of the ground truth; for "semantic" a text file with lines ``image label_map``.
    images: folder that image names are relative to.
    masks: folder of ground-truth PNGs (panoptic, semantic); default: named like `annotations`.
    group_by: field of the image records; scores are also given per value of it.
    views: 5 (whole image and corner crops), 1, or 0: what the model was made for.
    min_size, max_size: shortest and longest edge of every view, or 0: as the checkpoint says, else 800 and 1333.
    score_mode: see `esg_jax.inference.entities.scores.ScoreMode`.
    batch_size: images per call of the network.
    num_classes, ignore_label: of semantic label maps.
    reader, captions, split: of the text, see `input.narratives.GroundingSourceConfig`.
    input_masks: what GELLA grounds text in: "ground_truth", "segmenter", or masks from elsewhere: a COCO file, or a
        folder with a mask file per image.
    segmenter, mask_threshold: CropFormer checkpoint (empty: the packaged demo weights), and the least score of its
        entities.
    phrases: "forced" gives GELLA the annotated phrases; "generated" lets it list them, which AR_text needs, and aligns
        its list with them by head nouns.
    nouns: who lists them: "model", "rule", or empty: as the weights say.
    plural_by: phrases count as plural when they have several "segments" (as first published) or by their "flag".
    soft: the 2021 protocol of PNG AR.
    rules: fields of `inference.grounding.decisions.GroundingConfig` as "NAME=VALUE".
    tokenizer, prompts, conversation: where the weights do not say.
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
    reader: str = ""
    captions: str = ""
    split: str = ""
    input_masks: str = "ground_truth"
    segmenter: str = ""
    mask_threshold: float = 0.3
    phrases: str = "forced"
    nouns: str = ""
    plural_by: str = "segments"
    soft: bool = False
    rules: tuple[str, ...] = ()
    tokenizer: str = ""
    prompts: str = ""
    conversation: str = ""
    max_images: int = 0
    grid_images: int = 8
    draw_threshold: float = 0.3

    def __post_init__(self):
        if self.task not in TASKS:
            raise EvaluationError(f"task is {self.task!r}; choose one of {', '.join(TASKS)}")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise EvaluationError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        if self.task in TEXT_TASKS:
            if not (self.reader and self.captions):
                raise EvaluationError(
                    f"task {self.task!r} needs --config.reader=NAME and --config.captions=FILE (see configs/recipes)"
                )
        elif not self.annotations:
            raise EvaluationError("no annotations given; set --config.annotations=FILE (and --config.images=FOLDER)")
        if self.task == "semantic" and self.num_classes < 1:
            raise EvaluationError("task 'semantic' needs num_classes")
