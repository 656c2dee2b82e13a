"""Statistics of annotated data sets (ESG Table 1).

The paper leaves the shape measures to an appendix; these are the usual ones (Zhu et al., CVPR 2017). Choices: all parts
of an entity together; holes count as background, so their rims add to the perimeter; the perimeter is the Crofton
estimate in four directions; the hull is that of the pixel squares.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool
from scipy.spatial import ConvexHull

from esg_jax.evaluation.metrics.accumulator import Accumulator
from esg_jax.evaluation.metrics.instances import as_instances
from esg_jax.masks import rle
from esg_jax.masks.rle import RLE


class AnnotationStatistics(Accumulator):
    """Resolution, entities per image, covered area, convexity and simplicity of a data set."""

    def add(self, image_id: Any, ground_truth: Any, size: Sequence[int]) -> None:
        """Adds one image: annotations (see `as_instances`), (height, width). Crowd regions only count as covered."""
        target = as_instances(ground_truth, image_id=image_id, size=size)
        rles = target.rles or []
        covered = rle.areas([rle.union(rles)])[0] if rles else 0.0
        shapes = [shape(m) for m, crowd in zip(rles, target.crowd, strict=True) if not crowd and rle.areas([m])[0]]
        self._store(image_id, (tuple(size), int((~target.crowd).sum()), covered / (size[0] * size[1]), shapes))

    def result(self) -> dict[str, Any]:
        """Means over images (`ImageRes` in pixels = sqrt(H W), `EntityNum`, `ValidArea`) and over entities
        (`Convexity`, the complexity column of the table, and `Simplicity`); lower = more complex shapes.
        """
        records = self._ordered()
        shapes = np.array([s for *_, shapes in records for s in shapes]).reshape(-1, 2)
        nan = float("nan")
        return {
            "ImageRes": float(np.mean([math.sqrt(h * w) for (h, w), *_ in records])) if records else nan,
            "EntityNum": float(np.mean([count for _, count, *_ in records])) if records else nan,
            "EntityNumMax": max((count for _, count, *_ in records), default=0),
            "Convexity": float(shapes[:, 0].mean()) if len(shapes) else nan,
            "Simplicity": float(shapes[:, 1].mean()) if len(shapes) else nan,
            "ValidArea": float(np.mean([valid for _, _, valid, _ in records])) if records else nan,
            "num_images": len(records),
        }


def shape(mask: RLE) -> tuple[float, float]:
    """(convexity, simplicity) of a mask that is not empty: area / hull area, and sqrt(4 pi area) / perimeter."""
    x, y, width, height = (int(v) for v in rle.boxes([mask])[0])
    crop = rle.decode(mask)[y : y + height, x : x + width]
    area = int(crop.sum())
    return area / _hull_area(crop), math.sqrt(4 * math.pi * area) / perimeter(crop)


def perimeter(mask: Bool[np.ndarray, "h w"]) -> float:
    """Crofton estimate: crossings of lines in four directions, weighted by the spacing of the lines."""
    m = np.pad(np.asarray(mask, bool), 1)
    straight = np.count_nonzero(m[1:] != m[:-1]) + np.count_nonzero(m[:, 1:] != m[:, :-1])
    diagonal = np.count_nonzero(m[1:, 1:] != m[:-1, :-1]) + np.count_nonzero(m[1:, :-1] != m[:-1, 1:])
    return math.pi / 8 * (straight + diagonal / math.sqrt(2))


def _hull_area(mask: np.ndarray) -> float:
    rows = np.flatnonzero(mask.any(1))
    left = mask[rows].argmax(1)
    right = mask.shape[1] - mask[rows, ::-1].argmax(1)
    # Corners of the outermost pixel squares of every row.
    points = [(x, y + dy) for ends in (left, right) for x, y in zip(ends, rows, strict=True) for dy in (0, 1)]
    return float(ConvexHull(np.array(points)).volume)  # the "volume" of a polygon is its area
