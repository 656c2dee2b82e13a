"""Referring and reasoning segmentation: cIoU, gIoU, and answers to sentences that mean nothing."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from esg_jax.evaluation.metrics.accumulator import Accumulator
from esg_jax.evaluation.metrics.paired_masks import check_same_size, mask_of, pair_of
from esg_jax.masks import rle


class ReferringSegmentation(Accumulator):
    """cIoU and gIoU of referring and reasoning segmentation, arithmetic of LISA's `validate`.

    cIoU = summed intersections / summed unions; gIoU = mean per item of I / (U + 1e-5), 1 when both masks are empty.
    An item is one sentence. Pixels of an `ignore` mask are left out of both masks. With sentences that mean nothing
    (gRefCOCO, Liu et al. 2023): N-acc is the share of them answered with an empty mask, T-acc the share
    of the others answered with any.
    """

    def add(self, image_id: Any, items: Sequence[Mapping[str, Any]]) -> None:
        """Scores the items of one image: each with `pred`, `gt` and perhaps `ignore` (RLE or bool (H, W))."""
        counts = []
        for i, item in enumerate(items):
            where = f"image {image_id}, item {i}"
            pred, target = pair_of(item, where)
            masks = [rle.decode(m) for m in (pred, target)]
            if item.get("ignore") is not None:
                ignore = mask_of(item, "ignore", where)
                check_same_size(pred, ignore, where)
                keep = ~rle.decode(ignore)
                masks = [m & keep for m in masks]
            shared, union = masks[0] & masks[1], masks[0] | masks[1]
            counts.append([int(area.sum()) for area in (shared, union, *masks)])
        self._store(image_id, np.array(counts, np.int64).reshape(-1, 4))

    def result(self) -> dict[str, Any]:
        """`cIoU` (GLEE: oIoU), `gIoU`, `mIoU` (plain mean of items whose union is not empty), `P@0.5`, `num_items`.

        Also `N-acc` and `T-acc`, NaN without items of their kind.
        """
        counts = np.concatenate([*self._ordered(), np.zeros((0, 4), np.int64)])
        if not len(counts):
            return {name: float("nan") for name in ("cIoU", "gIoU", "mIoU", "P@0.5", "N-acc", "T-acc")}
        shared, union, predicted, target = counts.T.astype(np.float64)
        nothing = target == 0
        per_item = shared / (union + 1e-5) + (union == 0)
        plain = shared[union > 0] / union[union > 0]
        return {
            "cIoU": float(shared.sum() / (union.sum() + 1e-10)),
            "gIoU": float(per_item.mean()),
            "mIoU": float(plain.mean()) if plain.size else float("nan"),
            "P@0.5": float((per_item > 0.5).mean()),
            "N-acc": float((predicted[nothing] == 0).mean()) if nothing.any() else float("nan"),
            "T-acc": float((predicted[~nothing] > 0).mean()) if (~nothing).any() else float("nan"),
            "num_items": len(counts),
            "total_intersection": int(shared.sum()),
            "total_union": int(union.sum()),
            "iou_per_item": per_item.tolist(),
        }
