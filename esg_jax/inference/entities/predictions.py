"""What inference returns: plain numpy at the resolution of the original image."""

import dataclasses
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Float, Int

from esg_jax.masks import MaskSet, rle


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntityPrediction(MaskSet):
    """Non-overlapping masks, best first: one layer, int16.

    Rows are sorted by class score (the entityness); equal scores keep the order of the queries. An earlier row owns
    every pixel that later rows claim as well.

    Attributes:
        scores: confidence of every row, see `ScoreMode`.
        labels: class of every row; 0 for entities.
        queries: which query of the model made the row.
        class_scores: entityness of every row, the sort key.
    """

    scores: Float[np.ndarray, "n"]
    labels: Int[np.ndarray, "n"]
    queries: Int[np.ndarray, "n"]
    class_scores: Float[np.ndarray, "n"]

    @classmethod
    def of(cls, label_map: Int[np.ndarray, "h w"], scores: Float[np.ndarray, "n"], **columns: Any) -> Self:
        """The rows 1..n of a label map, by these numbers; `columns` are the other attributes."""
        return cls(layers=[label_map], ids=tuple(range(1, len(scores) + 1)), scores=scores, **columns)

    def above(self, threshold: float) -> Self:
        """Non-empty rows with a score of at least `threshold`, numbered anew, as the reference's demo shows them."""
        kept = self.select((self.scores >= threshold) & (self.areas > 0))
        return dataclasses.replace(kept, ids=tuple(range(1, len(kept) + 1)))


@dataclasses.dataclass
class InstancePrediction:
    """Overlapping instances of a class-aware model, best score first.

    Attributes:
        rles: compressed COCO run-length encodings.
        scores: confidence of every instance.
        labels: class index of every instance.
        queries: query that made it; one query may appear with several classes.
        size: (height, width) of the image.
    """

    rles: list[rle.RLE]
    scores: Float[np.ndarray, "n"]
    labels: Int[np.ndarray, "n"]
    queries: Int[np.ndarray, "n"]
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def masks(self) -> Bool[np.ndarray, "n h w"]:
        """All masks at once: N x H x W bytes, decoded anew on every access."""
        masks = [rle.decode(code) for code in self.rles]
        return np.stack(masks) if masks else np.zeros((0, *self.size), bool)


@dataclasses.dataclass(frozen=True)
class Segment:
    """One panoptic segment: its value in the map, class index, countable or not, class probability."""

    id: int
    category: int
    is_thing: bool
    score: float


@dataclasses.dataclass
class PanopticPrediction:
    """Disjoint segments; `segment_map` holds their ids, 0 where there is none."""

    segment_map: Int[np.ndarray, "h w"]
    segments: list[Segment]
