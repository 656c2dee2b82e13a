"""What the tasks of GELLA share: the model, and the entities that it grounds text in."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from esg_jax.evaluation.formats.files import field
from esg_jax.evaluation.metrics.errors import EvaluationError
from esg_jax.evaluation.tasks.task import EvalTask, ModelRun, Truth
from esg_jax.inference.bundle import Bundle
from esg_jax.inference.entities.predictor import Predictor
from esg_jax.inference.grounding.decisions import read_rules
from esg_jax.inference.grounding.grounder import Grounder
from esg_jax.inference.grounding.results import Scene
from esg_jax.input.readers import SourceConfig, open_source
from esg_jax.input.records import Record
from esg_jax.masks import MaskSet, NoMasksError, disjoint_masks, mask_file_of, read_masks


@dataclasses.dataclass(frozen=True)
class GrounderTask(EvalTask):
    """input_masks: what GELLA grounds text in: "ground_truth", "segmenter", or masks from elsewhere: a COCO file, or a
        folder with a mask file per image.
    segmenter, mask_threshold: CropFormer checkpoint (empty: the packaged demo weights), and the least score of its
        entities.
    nouns: who lists the phrases of a text: "model", "rule", or empty: as the weights say.
    rules: fields of `inference.grounding.decisions.GroundingConfig` as "NAME=VALUE".
    tokenizer, prompts, conversation: where the weights do not say.
    batch_size: images per call of the network.
    """

    input_masks: str = "ground_truth"
    segmenter: str = ""
    mask_threshold: float = 0.3
    nouns: str = ""
    rules: tuple[str, ...] = ()
    tokenizer: str = ""
    prompts: str = ""
    conversation: str = ""
    batch_size: int = 1

    def grounder(self, bundle: Bundle) -> Grounder:
        """The model as the evaluation wants it."""
        return bundle.system.grounder(
            bundle,
            tokenizer=self.tokenizer or None,
            conversation=self.conversation or None,
            prompts=self.prompts or None,
            rules=read_rules(self.rules, "--config.rules"),
            nouns=self.nouns or None,
            batch_size=self.batch_size,
        )

    def input_entities(self) -> "InputEntities":
        """Where the entities come from."""
        return InputEntities(self.input_masks, self.segmenter, self.mask_threshold)

    def category_names(self, categories: Sequence[dict[str, Any]]) -> list[str]:
        """What GELLA is asked for."""
        return [field(c, "name", f"{self.annotations}, category {c.get('id')}") for c in categories]

    def scenes_of(
        self, grounder: Grounder, reader: str, truth: Truth, run: ModelRun
    ) -> Iterator[list[tuple[Record, Scene | None]]]:
        """The images of a COCO file, seen by the model, some at a time."""
        source = open_source(SourceConfig(reader, self.annotations, self.images, getattr(self, "masks", "")))
        rows = {source[row].image_id: row for row in range(len(source))}
        entities = self.input_entities()
        for records in chunks([source[rows[uid]] for uid, _ in truth.images if uid in rows], self.batch_size):
            yield list(zip(records, entities.scenes(grounder, records), strict=True))
            run.advance(len(records))


class InputEntities:
    """The entities that text is grounded in: annotated ones, a segmenter's, or those of files.

    Args:
        choice, segmenter, threshold: see `GrounderTask`.

    Raises:
        EvaluationError: neither of them.
    """

    def __init__(self, choice: str, segmenter: str = "", threshold: float = 0.3):
        self._choice, self._threshold, self._predictor = choice, threshold, None
        if choice == "segmenter":
            self._predictor = Predictor.from_checkpoint(segmenter or None)
        elif choice != "ground_truth" and not Path(choice).exists():
            raise EvaluationError(
                f"input_masks is {choice!r}; choose ground_truth, segmenter, or a COCO file or folder of masks"
            )

    def check(self, complete: bool, file: str) -> None:
        """Refuses the annotated masks where they are but the answers."""
        if self._choice == "ground_truth" and not complete:
            raise EvaluationError(
                f"{file} annotates only what is asked for; ground text in masks of everything: "
                "--config.input_masks=segmenter, or a folder of masks"
            )

    def __call__(self, record: Record, pixels: np.ndarray, max_entities: int) -> MaskSet | None:
        """Disjoint entities of an image; None when there is none."""
        overlap = "score"
        if self._predictor is not None:
            masks = self._predictor(pixels).above(self._threshold)
        elif self._choice == "ground_truth":
            entities = record.load_entities()
            masks, overlap = entities.select(~entities.crowd), "area"
        else:
            name = Path(record.name)
            masks = read_masks(mask_file_of(self._choice, name.stem), pixels.shape[:2], name.name)
        try:
            return disjoint_masks(masks, overlap=overlap, max_entities=max_entities)
        except NoMasksError:
            return None

    def scenes(self, grounder: Grounder, records: Sequence[Record]) -> list[Scene | None]:
        """What the model sees; None for an image without entities, about which every answer is "not found"."""
        pixels = [record.load_image() for record in records]
        found = [self(*pair, grounder.max_entities) for pair in zip(records, pixels, strict=True)]
        kept = [row for row, entities in enumerate(found) if entities is not None]
        seen = grounder.look([pixels[row] for row in kept], [found[row] for row in kept])
        scenes = dict(zip(kept, seen, strict=True))
        return [scenes.get(row) for row in range(len(records))]


def chunks(items: list, size: int) -> list[list]:
    """The items, `size` at a time."""
    return [items[start : start + size] for start in range(0, len(items), size)]
