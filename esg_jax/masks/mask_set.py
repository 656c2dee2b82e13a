"""The masks of one image, and how overlapping ones become disjoint."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Float, Int

from esg_jax.masks import rle

BACKGROUND = 0  # of every label map
OVERLAPS = ("score", "area", "logit")


class NoMasksError(ValueError):
    """An image without a single mask; text cannot be grounded in it."""


@dataclasses.dataclass(frozen=True)
class MaskSet:
    """Masks of one image at one resolution, possibly overlapping.

    Subclasses add columns: arrays with one row per mask.

    Attributes:
        layers: label maps; value k + 1 marks mask k, `BACKGROUND` none, and each mask lies in exactly one. Disjoint
            masks share one.
        ids: what the source calls the masks.
        scores: confidence of each; None where the source has none.
        probabilities: per pixel, where the source has them.
        dropped: ids of masks that are not here: others cover them, they are too small, or more than the limit.
    """

    layers: Sequence[Int[np.ndarray, "h w"]]
    ids: tuple[Any, ...]
    scores: Float[np.ndarray, "n"] | None = None
    probabilities: Float[np.ndarray, "n h w"] | None = None
    dropped: tuple[Any, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image."""
        return self.layers[0].shape

    @property
    def label_map(self) -> Int[np.ndarray, "h w"]:
        """The one layer of disjoint masks.

        Raises:
            ValueError: masks overlap, see `disjoint_masks`.
        """
        if len(self.layers) != 1:
            raise ValueError(f"{len(self)} masks in {len(self.layers)} layers are no single label map")
        return self.layers[0]

    @property
    def areas(self) -> Int[np.ndarray, "n"]:
        """Pixels of every mask."""
        total = np.zeros(len(self) + 1, np.int64)
        for layer in self.layers:
            total += np.bincount(layer.ravel(order="K"), minlength=len(total))
        return total[1:]

    @property
    def masks(self) -> Bool[np.ndarray, "n h w"]:
        """All masks at once: N x H x W bytes, built anew on every access. Large images: use `rles`."""
        return np.stack([self.mask(row) for row in range(len(self))]) if len(self) else np.zeros((0, *self.size), bool)

    def mask(self, row: int) -> Bool[np.ndarray, "h w"]:
        """One mask."""
        return self.union([row])

    def union(self, rows: Sequence[int]) -> Bool[np.ndarray, "h w"]:
        """One mask of several."""
        table = np.zeros(len(self) + 1, bool)
        table[np.asarray(rows, int) + 1] = True
        return np.logical_or.reduce([table[layer] for layer in self.layers])

    def rles(self) -> list[rle.RLE]:
        """Compressed COCO run-length encodings of all masks."""
        if len(self.layers) == 1:
            return rle.encode_labels(self.layers[0], len(self))
        return [rle.encode(self.mask(row)[None])[0] for row in range(len(self))]

    def select(self, keep: Bool[np.ndarray, "n"]) -> Self:
        """The masks where `keep` holds; pixels of the others become background."""
        keep = np.asarray(keep, bool)
        table = np.where(np.append(False, keep), np.append(0, np.cumsum(keep)), BACKGROUND)
        columns = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        kept = {name: column[keep] for name, column in columns.items() if isinstance(column, np.ndarray)}
        layers = [table.astype(layer.dtype)[layer] for layer in self.layers]
        return dataclasses.replace(self, layers=layers, ids=tuple(itertools.compress(self.ids, keep)), **kept)


def disjoint_masks(masks: MaskSet, *, overlap: str = "score", min_area: int = 1, max_entities: int = 100) -> MaskSet:
    """Settles overlaps at the original resolution, then drops what is too small.

    Args:
        masks: of one image.
        overlap: who owns a pixel that several masks claim: "score": the most confident one (masks without scores: as
            "area"); "area": the smallest; "logit": the largest score times probability, as in panoptic merging.
        min_area: entities left with fewer pixels are dropped.
        max_entities: of more, the largest are kept.

    Raises:
        NoMasksError: no masks at all, or none that is left.
        ValueError: an unknown `overlap`, or "logit" without probabilities.
    """
    if overlap not in OVERLAPS:
        raise ValueError(f"overlap is {overlap!r}; choose one of {', '.join(OVERLAPS)}")
    if not len(masks):
        raise NoMasksError("there are no masks to ground text in; lower the segmenter's threshold or give masks")
    if overlap == "logit":
        if masks.probabilities is None:
            raise ValueError("overlap 'logit' needs probabilities: an (n, h, w) array of floating-point values")
        weights = np.ones(len(masks), np.float32) if masks.scores is None else masks.scores
        strength = np.where(masks.probabilities > 0.5, masks.probabilities * weights[:, None, None], 0)
        owner = np.where(strength.max(axis=0) > 0, strength.argmax(axis=0) + 1, 0)
    else:
        # Painted from the weakest to the strongest; of equals the first one wins.
        strength = masks.scores if overlap == "score" and masks.scores is not None else -masks.areas
        order = np.argsort(-np.asarray(strength, np.float64), kind="stable")[::-1]
        ranks = np.zeros(len(masks) + 1, np.int32)
        ranks[order + 1] = np.arange(1, len(masks) + 1)
        painted = ranks[masks.layers[0]]
        for layer in masks.layers[1:]:
            painted = np.maximum(painted, ranks[layer])
        owner = np.concatenate([[0], order + 1])[painted]
    left = np.bincount(owner.ravel(), minlength=len(masks) + 1)[1:]
    kept = np.flatnonzero(left >= max(min_area, 1))
    if len(kept) > max_entities:
        kept = np.sort(kept[np.argsort(-left[kept], kind="stable")[:max_entities]])
    if not len(kept):
        raise NoMasksError(f"all {len(masks)} masks are empty or smaller than min_area {min_area}")
    table = np.zeros(len(masks) + 1, np.int32)
    table[kept + 1] = np.arange(1, len(kept) + 1)
    gone = set(range(len(masks))) - set(kept.tolist())
    return MaskSet(
        [table[owner]],
        tuple(masks.ids[row] for row in kept),
        None if masks.scores is None else np.asarray(masks.scores, np.float32)[kept],
        dropped=tuple(masks.ids[row] for row in sorted(gone)),
    )
