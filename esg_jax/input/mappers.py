"""From a record to one training example, or to the views of inference.

An example holds the arrays of the batch contract without the batch dimension (T views, N = `max_entities` slots):
``image`` uint8 (T, H, W, 3), ``size`` int32 (T, 2), ``masks`` uint8 (N, T, H, W // 8), ``labels`` int32 (N,),
``present`` bool (N,), ``valid`` bool (N, T), and ``exhaustive`` bool () in a mixture where not every source is.
"""

import dataclasses

import numpy as np
from jaxtyping import Float
from PIL import Image

from esg_jax.input import augment, transforms
from esg_jax.input.records import Entities, Record
from esg_jax.input.square import entity_map, square_image
from esg_jax.input.transforms import View

Example = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class EntityCrop:
    """The crop data loader: the whole image and one random corner crop, both shortest-edge resized (T=2).

    Flip and shortest edge are drawn once per example and shared by both views; see `transforms` for the geometry.
    With `crop=False` only the whole image is given (T=1).

    All annotated entities are kept, also those that neither view shows: the batch-level targets of the reference
    include them as empty masks. When an image has more than `max_entities`, the largest ones at the original
    resolution are kept, in annotation order. `valid` is "the resized mask has a pixel"; the reference also asks for a
    non-empty annotated box, which follows from it when boxes and masks agree.

    With `zoom` (smallest, largest magnification) the views are those of a random window of the picture, or of the
    picture in a larger gray one; entities that no view shows are left out then. `colour` is the strength of one random
    change of colour for all views, see `augment`.
    """

    short_edges: tuple[int, ...]
    max_size: int
    padded: tuple[int, int]
    max_entities: int
    class_agnostic: bool = True
    crop: bool = True
    zoom: tuple[float, float] = (1.0, 1.0)
    colour: float = 0.0

    def __call__(self, record: Record, rng: np.random.Generator) -> Example:
        flip = bool(rng.random() < 0.5)
        short_edge = int(rng.choice(self.short_edges))
        corner = int(rng.integers(4))
        window = matrix = None
        if self.zoom != (1, 1):
            window = augment.random_window(rng, record.height, record.width, self.zoom)
        if self.colour:
            matrix = augment.random_colour_matrix(rng, self.colour)
        return self.build(record, flip, short_edge, corner, window, matrix)

    def build(
        self,
        record: Record,
        flip: bool,
        short_edge: int,
        corner: int,
        window: tuple[int, int, int, int] | None = None,
        matrix: Float[np.ndarray, "3 4"] | None = None,
    ) -> Example:
        """The example for given random choices.

        Args:
            corner: 0..3 as TL, TR, BL, BR of the flipped picture.
            window: (x0, y0, x1, y1) of what the views take for the picture, see `augment.random_window`.
            matrix: of `augment.change_colour`.
        """
        entities, image = record.load_entities(), record.load_image()
        views = self._views(record.height, record.width, flip, short_edge, corner)
        if window is not None:
            layers = [augment.window(layer, window, fill=0) for layer in entities.layers]
            entities = dataclasses.replace(entities, layers=layers)
            image = augment.window(image, window, fill=augment.SURROUND)
            # Sizes stay those of the whole picture: the bucket was chosen for them.
            inner = self._views(*image.shape[:2], flip, short_edge, corner)
            views = [dataclasses.replace(view, size=old.size) for view, old in zip(inner, views, strict=True)]
        layers = [[transforms.view_labels(layer, view) for layer in entities.layers] for view in views]
        kept = ~entities.crowd
        if window is not None:
            kept &= sum(dataclasses.replace(entities, layers=view).areas for view in layers) > 0
        kept = np.flatnonzero(kept)
        if len(kept) > self.max_entities:
            kept = np.sort(kept[np.argsort(-entities.areas[kept], kind="stable")[: self.max_entities]])
        images = [transforms.view_image(image, view) for view in views]
        if matrix is not None:
            images = [augment.change_colour(view, matrix) for view in images]
        images = [transforms.pad_image(view, self.padded) for view in images]
        example = _targets(entities, layers, kept, self.padded, self.max_entities, self.class_agnostic)
        return {"image": np.stack(images), "size": np.array([view.size for view in views], np.int32), **example}

    def _views(self, height: int, width: int, flip: bool, short_edge: int, corner: int) -> list[View]:
        views = [transforms.full_view(height, width, short_edge, self.max_size, flip)]
        if self.crop:
            views.append(transforms.crop_view(height, width, corner, short_edge, self.max_size, flip))
        return views


@dataclasses.dataclass(frozen=True)
class LargeScaleJitter:
    """Large-scale jitter of the Mask2Former configs: flip, resize by `scales`, fixed square crop (T=1).

    The image is scaled by `u * crop / longest side` with u uniform in `scales`; a random window of `crop` pixels is
    taken, and what the image does not fill has gray 128 and no mask. The padding counts as image (`size` is the
    whole crop), as in the reference. Entities outside the window are removed; of more than `max_entities` the largest
    in the window stay.
    """

    crop: int
    max_entities: int
    scales: tuple[float, float] = (0.1, 2.0)
    class_agnostic: bool = True

    def __call__(self, record: Record, rng: np.random.Generator) -> Example:
        flip = bool(rng.random() < 0.5)
        return self.build(record, flip, float(rng.uniform(*self.scales)), float(rng.random()))

    def build(self, record: Record, flip: bool, scale: float, offset: float) -> Example:
        """The example for given random choices; `offset` in [0, 1] places the window on both axes."""
        height, width = record.height, record.width
        factor = min(scale * self.crop / height, scale * self.crop / width)
        resized = np.maximum(np.round(np.multiply((height, width), factor)).astype(int), 1)
        start = np.round(np.maximum(resized - self.crop, 0) * offset).astype(int)
        window = np.minimum(resized, self.crop)

        image = record.load_image()
        image = np.ascontiguousarray(image[:, ::-1]) if flip else image
        step_y, step_x = height / resized[0], width / resized[1]
        box = (start[1] * step_x, start[0] * step_y, (start + window)[1] * step_x, (start + window)[0] * step_y)
        box = (*box[:2], min(box[2], width), min(box[3], height))
        view = Image.fromarray(image).resize((window[1], window[0]), Image.Resampling.BILINEAR, box=box)
        padded = (self.crop, self.crop)

        entities = record.load_entities()
        whole = View((0, 0, width, height), (int(resized[0]), int(resized[1])), flip)
        rows, columns = (slice(start[axis], start[axis] + window[axis]) for axis in (0, 1))
        layers = [transforms.view_labels(layer, whole)[rows, columns] for layer in entities.layers]
        areas = dataclasses.replace(entities, layers=layers).areas
        kept = np.flatnonzero(~entities.crowd & (areas > 0))
        if len(kept) > self.max_entities:
            kept = np.sort(kept[np.argsort(-areas[kept], kind="stable")[: self.max_entities]])
        example = _targets(entities, [layers], kept, padded, self.max_entities, self.class_agnostic)
        pixels = transforms.pad_image(np.asarray(view), padded, value=128)
        return {"image": pixels[None], "size": np.array([padded], np.int32), **example}


@dataclasses.dataclass(frozen=True)
class MarkExhaustive:
    """Adds to examples of a source whether all their entities are annotated."""

    exhaustive: bool

    def __call__(self, example: Example) -> Example:
        return {**example, "exhaustive": np.array(self.exhaustive)}


@dataclasses.dataclass(frozen=True)
class EvalExample:
    """Views of one image for inference, and the record that knows its annotations.

    image: uint8 (T, H, W, 3), zero padded. size: int32 (T, 2), unpadded (height, width) of every view.
    boxes: int32 (T, 4), (x0, y0, x1, y1) of every view in original pixels.
    """

    image: np.ndarray
    size: np.ndarray
    boxes: np.ndarray
    record: Record


@dataclasses.dataclass(frozen=True)
class InferenceViews:
    """The whole image and, with five views, its corner crops; see `transforms.inference_views`.

    The padded size is the first of `buckets` (sorted by area) that holds all views, or without buckets the next
    multiples of 32.
    """

    num_views: int = 5
    short_edge: int = 800
    max_size: int = 1333
    buckets: tuple[tuple[int, int], ...] = ()

    def __call__(self, record: Record) -> EvalExample:
        options = {"num_views": self.num_views, "short_edge": self.short_edge, "max_size": self.max_size}
        padded = None
        if self.buckets:
            views = transforms.inference_view_list(record.height, record.width, **options)
            padded = self.buckets[bucket_index([view.size for view in views], self.buckets, record.name)]
        image, size, boxes = transforms.inference_views(record.load_image(), padded=padded, **options)
        return EvalExample(image, size, boxes, record)


@dataclasses.dataclass(frozen=True)
class Colormap:
    """Image and label map for GELLA's reconstruction, see `square`; half of the examples are mirrored.

    The example holds ``image`` uint8 (image_size, image_size, 3), ``image_size`` int32 (2,), ``label_map`` int16
    (map_size, map_size) and ``map_size`` int32 (2,).
    """

    image_size: int
    map_size: int
    max_entities: int
    pad_position: str = "bottom_right"

    def __call__(self, record: Record, rng: np.random.Generator) -> Example:
        image, entities = record.load_image(), record.load_entities()
        if rng.random() < 0.5:
            image = image[:, ::-1]
            entities = dataclasses.replace(entities, layers=[layer[:, ::-1] for layer in entities.layers])
        image, image_size = square_image(image, self.image_size, self.pad_position)
        label_map, map_size, _ = entity_map(entities, self.map_size, self.max_entities, self.pad_position)
        return {"image": image, "image_size": image_size, "label_map": label_map, "map_size": map_size}


def bucket_index(sizes: list[tuple[int, int]], buckets: tuple[tuple[int, int], ...], name: str) -> int:
    """Index of the bucket of least area that holds all view sizes (height, width).

    Raises:
        ValueError: none does; names the image, the size needed and the buckets.
    """
    height, width = max(size[0] for size in sizes), max(size[1] for size in sizes)
    fitting = [i for i, bucket in enumerate(buckets) if bucket[0] >= height and bucket[1] >= width]
    if not fitting:
        raise ValueError(
            f"image {name} needs a padded size of {height}x{width} (height x width), larger than every bucket in "
            f"{list(buckets)}; add one to `buckets`, or lower the shortest edge or max_size"
        )
    return min(fitting, key=lambda i: buckets[i][0] * buckets[i][1])


def _targets(
    entities: Entities,
    layers_by_view: list[list[np.ndarray]],
    kept: np.ndarray,
    padded: tuple[int, int],
    max_entities: int,
    class_agnostic: bool,
) -> Example:
    num_views, num_kept = len(layers_by_view), len(kept)
    masks = np.zeros((max_entities, num_views, padded[0], padded[1] // 8), np.uint8)
    valid = np.zeros((max_entities, num_views), bool)
    for t, layers in enumerate(layers_by_view):
        masks[:num_kept, t], valid[:num_kept, t] = transforms.packed_masks(layers, kept, padded)
    labels = np.zeros(max_entities, np.int32)
    if not class_agnostic:
        labels[:num_kept] = entities.labels[kept]
    return {"masks": masks, "labels": labels, "present": np.arange(max_entities) < num_kept, "valid": valid}
