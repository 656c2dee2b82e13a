"""Bring your own masks: any set of masks as the label map that grounding works on."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from esg_jax.inference.entities.predictions import EntityPrediction, label_map_rles
from esg_jax.input.mask_files import MaskSet

OVERLAPS = ("score", "area", "logit")


class NoMasksError(ValueError):
    """An image without a single mask; text cannot be grounded in it."""


@dataclasses.dataclass(frozen=True)
class EntityMasks:
    """Disjoint entities of one image at its own resolution.

    Attributes:
        label_map: 0 where there is no entity, k + 1 for entity k.
        ids: what the source calls the entities.
        scores: their confidence; None where the source has none.
        dropped: ids of masks that others cover, that are too small, or that are more than the limit.
    """

    label_map: Int[np.ndarray, "h w"]
    ids: tuple[Any, ...]
    scores: Float[np.ndarray, "n"] | None = None
    dropped: tuple[Any, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image."""
        return self.label_map.shape

    @property
    def areas(self) -> Int[np.ndarray, "n"]:
        """Pixels of every entity."""
        return np.bincount(self.label_map.ravel(), minlength=len(self) + 1)[1:]

    def union(self, rows: Sequence[int]) -> Bool[np.ndarray, "h w"]:
        """One mask of several entities."""
        table = np.zeros(len(self) + 1, bool)
        table[np.asarray(rows, int) + 1] = True
        return table[self.label_map]

    def rles(self) -> list[dict[str, Any]]:
        """Compressed COCO run-length encodings of all entities."""
        return label_map_rles(self.label_map - 1, len(self))

    @classmethod
    def from_prediction(cls, prediction: EntityPrediction, max_entities: int) -> "EntityMasks":
        """The non-empty entities of a segmenter's prediction; ids are its rows, counted from 1."""
        ranks = prediction.label_map.astype(np.int32) + 1
        masks = MaskSet([ranks], tuple(range(1, len(prediction) + 1)), prediction.scores)
        found = disjoint_masks(masks, max_entities=max_entities)
        empty = {row + 1 for row in np.flatnonzero(prediction.areas == 0).tolist()}
        return dataclasses.replace(found, dropped=tuple(mask for mask in found.dropped if mask not in empty))


def disjoint_masks(
    masks: MaskSet, *, overlap: str = "score", min_area: int = 1, max_entities: int = 100
) -> EntityMasks:
    """Settles overlaps at the original resolution, then drops what is too small.

    Args:
        masks: from `read_masks`.
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
    areas = sum(np.bincount(layer.ravel(), minlength=len(masks) + 1)[1:] for layer in masks.layers)
    if overlap == "logit":
        if masks.probabilities is None:
            raise ValueError("overlap 'logit' needs probabilities: an (n, h, w) array of floating-point values")
        weights = np.ones(len(masks), np.float32) if masks.scores is None else masks.scores
        strength = np.where(masks.probabilities > 0.5, masks.probabilities * weights[:, None, None], 0)
        owner = np.where(strength.max(axis=0) > 0, strength.argmax(axis=0) + 1, 0)
    else:
        # Painted from the weakest to the strongest; of equals the first one wins.
        strength = masks.scores if overlap == "score" and masks.scores is not None else -areas
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
    return EntityMasks(
        table[owner],
        tuple(masks.ids[row] for row in kept),
        None if masks.scores is None else np.asarray(masks.scores, np.float32)[kept],
        tuple(masks.ids[row] for row in sorted(gone)),
    )
