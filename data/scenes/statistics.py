"""Statistics of dense entity labels, and how well colour clustering alone finds the entities.

    python -m data.scenes.statistics --annotations DIR/annotations.json --images DIR [--limit 60]

Everything is measured on label maps scaled to a long side of 640 pixels, so that sets of different resolution
compare. The floor is Felzenszwalb's superpixels (scale 400): mean over entities of the best IoU with any superpixel,
and the share of entities with a best IoU of at least 0.5. Needs scikit-image.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterable

import numpy as np
from jaxtyping import Int, UInt8
from scipy import ndimage

from esg_jax.input import transforms
from esg_jax.input.readers import SourceConfig, open_source

LONG_SIDE = 640


@dataclasses.dataclass
class EntityStatistics:
    """One row per entity (arrays) or per image (`counts`).

    areas: fraction of the image. compactness: perimeter^2 / (4 pi area), from the length of the pixel outline
    corrected for its staircase. parts: 8-connected components. floor_iou: best IoU with a superpixel, NaN if not asked.
    """

    counts: np.ndarray
    areas: np.ndarray
    compactness: np.ndarray
    parts: np.ndarray
    floor_iou: np.ndarray

    def summary(self) -> dict[str, object]:
        """Quantiles and shares that `data/scenes/README.md` lists."""

        def quantiles(values, digits):
            return [round(float(value), digits) for value in np.percentile(values, (10, 25, 50, 75, 90))]

        small = 32 * 32 / (640 * 480)
        return {
            "images": len(self.counts),
            "entities": len(self.areas),
            "entities per image, 10/25/50/75/90 %": quantiles(self.counts, 0),
            "area, 10/25/50/75/90 %": quantiles(self.areas, 4),
            "share under 32x32 px at 640x480": round(float((self.areas < small).mean()), 3),
            "share in two or more parts": round(float((self.parts > 1).mean()), 3),
            "compactness, median and 90 %": [round(float(np.percentile(self.compactness, q)), 2) for q in (50, 90)],
            "superpixel mean best IoU": round(float(np.nanmean(self.floor_iou)), 3),
            "superpixel recall at IoU 0.5": round(float(np.nanmean(self.floor_iou >= 0.5)), 3),
            "superpixel recall at IoU 0.75": round(float(np.nanmean(self.floor_iou >= 0.75)), 3),
        }


def measure(
    samples: Iterable[tuple[UInt8[np.ndarray, "h w 3"], list[Int[np.ndarray, "h w"]]]], floor: bool = True
) -> EntityStatistics:
    """Statistics of (image, label maps) pairs; in a label map, 0 is nothing and every other value one entity."""
    rows: list[tuple[float, float, int, float]] = []
    counts = []
    for image, layers in samples:
        height, width = image.shape[:2]
        size = transforms.shortest_edge_size(height, width, LONG_SIDE, LONG_SIDE)
        view = transforms.View((0, 0, width, height), size)
        before = len(rows)
        segments = _superpixels(transforms.view_image(image, view)) if floor else None
        for layer in layers:
            labels = transforms.view_labels(layer, view)
            for value in np.unique(labels[labels > 0]):
                rows.append(_entity(labels == value, segments))
        counts.append(len(rows) - before)
    areas, compactness, parts, iou = (np.array(column) for column in zip(*rows, strict=True))
    return EntityStatistics(np.array(counts), areas, compactness, parts, iou)


def _entity(mask: np.ndarray, segments: np.ndarray | None) -> tuple[float, float, int, float]:
    area = int(mask.sum())
    padded = np.pad(mask, 1)
    edges = (padded[1:] != padded[:-1]).sum() + (padded[:, 1:] != padded[:, :-1]).sum()
    perimeter = edges * np.pi / 4  # mean over directions of (true length / staircase length)
    best = np.nan
    if segments is not None:
        overlap = np.bincount(segments[mask], minlength=segments.max() + 1)
        union = np.bincount(segments.ravel(), minlength=len(overlap)) + area - overlap
        best = float((overlap / union).max())
    parts = int(ndimage.label(mask, np.ones((3, 3)))[1])
    return area / mask.size, max(float(perimeter**2 / (4 * np.pi * area)), 1.0), parts, best


def _superpixels(image: np.ndarray) -> np.ndarray:
    from skimage.segmentation import felzenszwalb

    return felzenszwalb(image, scale=400)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.scenes.statistics",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--annotations", required=True, help="COCO JSON with entity masks")
    parser.add_argument("--images", default="", help="folder of the images; default: the folder of the JSON")
    parser.add_argument("--limit", type=int, default=0, help="measure only the first images; 0 means all")
    parser.add_argument("--no-floor", action="store_true", help="leave out the superpixels, the slow part")
    arguments = parser.parse_args()
    source = open_source(SourceConfig(annotations=arguments.annotations, images=arguments.images))
    count = min(len(source), arguments.limit or len(source))
    records = (source[index] for index in range(count))
    samples = ((record.load_image(), record.load_entities().layers) for record in records)
    print(json.dumps(measure(samples, floor=not arguments.no_floor).summary(), indent=2))


if __name__ == "__main__":
    main()
