"""What inference returns: plain numpy at the resolution of the original image."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Int16
from pycocotools import mask as coco_mask

BACKGROUND = -1


@dataclasses.dataclass
class EntityPrediction:
    """Non-overlapping masks, best first.

    Rows are sorted by class score (the entityness); equal scores keep the order of the queries. An earlier row owns
    every pixel that later rows claim as well.

    Attributes:
        label_map: row that owns each pixel, -1 where no entity is.
        scores: confidence of every row, see `ScoreMode`.
        labels: class of every row; 0 for entities.
        queries: which query of the model made the row.
        class_scores: entityness of every row, the sort key.
    """

    label_map: Int16[np.ndarray, "h w"]
    scores: Float[np.ndarray, "n"]
    labels: Int[np.ndarray, "n"]
    queries: Int[np.ndarray, "n"]
    class_scores: Float[np.ndarray, "n"]

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image."""
        return self.label_map.shape

    @property
    def masks(self) -> Bool[np.ndarray, "n h w"]:
        """All masks at once: N x H x W bytes, built anew on every access. Large images: use `rles`."""
        return self.label_map == np.arange(len(self), dtype=np.int16)[:, None, None]

    @property
    def areas(self) -> Int[np.ndarray, "n"]:
        """Pixels of every row."""
        return np.bincount(self.label_map.ravel() + 1, minlength=len(self) + 1)[1:]

    def rles(self) -> list[dict[str, Any]]:
        """Compressed COCO run-length encodings ({"size": [h, w], "counts": bytes}) of all rows."""
        return label_map_rles(self.label_map, len(self))

    def select(self, keep: Bool[np.ndarray, "n"]) -> "EntityPrediction":
        """The rows where `keep` holds; pixels of the others become background."""
        keep = np.asarray(keep, bool)
        renumber = np.full(len(self) + 1, BACKGROUND, np.int16)  # last entry: background, reached by index -1
        renumber[:-1][keep] = np.arange(keep.sum())
        return EntityPrediction(
            renumber[self.label_map],
            self.scores[keep],
            self.labels[keep],
            self.queries[keep],
            self.class_scores[keep],
        )

    def above(self, threshold: float) -> "EntityPrediction":
        """Non-empty rows with a score of at least `threshold`, as the reference's demo shows them."""
        return self.select((self.scores >= threshold) & (self.areas > 0))


def label_map_rles(label_map: Int[np.ndarray, "h w"], count: int) -> list[dict[str, Any]]:
    """Compressed COCO encodings of labels 0..count-1 of a label map, in one pass over the pixels.

    Args:
        label_map: labels; negative values and those from `count` on are ignored.
        count: number of masks.
    """
    height, width = label_map.shape
    flat = np.ascontiguousarray(label_map.T).ravel()  # COCO runs go down the columns
    starts = np.flatnonzero(np.diff(flat, prepend=flat[0] + 1 if flat.size else 0))
    ends = np.append(starts[1:], flat.size)
    owners = flat[starts]
    by_owner = np.argsort(owners, kind="stable")
    bounds = np.searchsorted(owners[by_owner], np.arange(count + 1))
    rles = []
    for row in range(count):
        runs = by_owner[bounds[row] : bounds[row + 1]]
        edges = np.stack([starts[runs], ends[runs]], axis=1).ravel()
        tail = [flat.size] if edges.size == 0 or edges[-1] < flat.size else []
        counts = np.diff(np.concatenate([[0], edges, tail]).astype(np.int64))
        rles.append(coco_mask.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width))
    return rles


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

    rles: list[dict[str, Any]]
    scores: Float[np.ndarray, "n"]
    labels: Int[np.ndarray, "n"]
    queries: Int[np.ndarray, "n"]
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def masks(self) -> Bool[np.ndarray, "n h w"]:
        """All masks at once: N x H x W bytes, decoded anew on every access."""
        masks = [coco_mask.decode(rle).astype(bool) for rle in self.rles]
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
