"""What an evaluation task is."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from esg_jax.evaluation.metrics.errors import EvaluationError
from esg_jax.inference.bundle import Bundle
from esg_jax.viz import GridRow


@dataclasses.dataclass(frozen=True)
class Truth:
    """What is right, read once.

    Attributes:
        images: (image id, path) of everything that is predicted and scored.
        content: the annotations, as the task knows them.
    """

    images: list[tuple[Any, Path]]
    content: Any = None


@dataclasses.dataclass(frozen=True)
class ModelRun:
    """How a model is run.

    Attributes:
        bundle: the model: weights of a file, or of a training state where they are.
        out: folder for what a task writes beside its records.
        advance: told how many images are done.
    """

    bundle: Bundle
    out: Path
    advance: Callable[[int], None] = lambda count: None


@dataclasses.dataclass(frozen=True)
class EvalTask:
    """One evaluation of a model, as a recipe fills it in; the command line overrides its fields.

    A task says what is right, how a model answers, how the answers are scored, and how they look. Answers travel
    through files, so that they can be scored again without a model, and several hosts can make them.

    annotations: ground truth.
    images: folder that image names are relative to.
    max_images: only the first so many images, for a quick look; 0 = all.
    grid_images: images in the picture grid.
    """

    name: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]  # results of the printed table

    annotations: str = ""
    images: str = ""
    max_images: int = 0
    grid_images: int = 8

    def __post_init__(self) -> None:
        if not self.annotations:
            raise EvaluationError("no annotations given; set --config.annotations=FILE (and --config.images=FOLDER)")

    @property
    def file(self) -> str:
        """The file that says what is evaluated."""
        return self.annotations

    def truth(self) -> Truth:
        """Reads the ground truth.

        Raises:
            EvaluationError: unreadable annotations.
        """
        raise NotImplementedError

    def predict(self, truth: Truth, run: ModelRun) -> Any:
        """Answers of a model about `truth.images`: what this process's file of predictions holds, JSON.

        All processes are called alike and share the work; each answer must be in the file of one of them.
        """
        raise NotImplementedError

    def score(self, truth: Truth, files: Sequence[Path], *, workers: int = 1) -> dict[str, Any]:
        """Results of the whole set (`metrics`), perhaps of `groups`.

        Args:
            truth: from `truth`.
            files: prediction files, one per host.
            workers: processes.
        """
        raise NotImplementedError

    def draw(self, truth: Truth, files: Sequence[Path]) -> Iterator[GridRow]:
        """`grid_images` images with prediction and ground truth, spread over the set."""
        raise NotImplementedError

    def spread(self, items: Sequence[Any]) -> list[Any]:
        """`grid_images` of the items."""
        count = min(self.grid_images, len(items))
        return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, count).round().astype(int))]


def is_own(index: int) -> bool:
    """Whether this process writes what is predicted of image `index`."""
    return index % jax.process_count() == jax.process_index()


def check_choice(task: EvalTask, name: str, allowed: Sequence[str]) -> None:
    """Raises EvaluationError when a field has another value."""
    if getattr(task, name) not in allowed:
        raise EvaluationError(f"{name} is {getattr(task, name)!r}; choose one of {', '.join(allowed)}")
