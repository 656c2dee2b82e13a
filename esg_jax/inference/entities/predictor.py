"""Images in, masks out."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from esg_jax.inference.bundle import Bundle, open_bundle
from esg_jax.inference.engine import Engine, Program, fill, read_ahead
from esg_jax.inference.entities import class_aware
from esg_jax.inference.entities.canvas import make_canvas, power_of_two
from esg_jax.inference.entities.painting import paint
from esg_jax.inference.entities.predictions import EntityPrediction, InstancePrediction, PanopticPrediction
from esg_jax.inference.entities.scores import ScoreMode
from esg_jax.input.image_io import ImageError, ImageLike, pixels_of, size_of
from esg_jax.input.mappers import bucket_index
from esg_jax.input.transforms import inference_view_list, inference_views, round_up
from esg_jax.models.cropformer import CropFormer
from esg_jax.weights import demo_checkpoint


class Framing(NamedTuple):
    """Where the views of an image lie: (height, width) after resizing, boxes in the image, padded and original size."""

    size_t2: np.ndarray
    box_t4: np.ndarray
    padded: tuple[int, int]
    original: tuple[int, int]


class Predictor:
    """Entity masks (and, for models with several classes, instances, segments, labels) of images of any size."""

    def __init__(
        self,
        model: CropFormer,
        *,
        views: int | None = None,
        min_size: int = 800,
        max_size: int = 1333,
        score_mode: ScoreMode | str = ScoreMode.REFERENCE,
        max_entities: int = 100,
        buckets: Sequence[tuple[int, int]] = (),
        mesh: Mesh | None = None,
    ):
        """Prepares inference; the first image of every padded size takes a compilation.

        Args:
            model: a CropFormer or a plain Mask2Former; its arrays may be those of a run in progress, on its mesh.
            views: 5 (whole image and four corner crops, batch level) or 1 (whole image, image level). By default 5 if
                the model associates views.
            min_size, max_size: of the shortest-edge resize of every view, in pixels.
            score_mode: see `ScoreMode`.
            max_entities: most rows returned with one view (five views return all queries, as the reference does).
            buckets: padded (height, width) to choose from, multiples of 32, to bound the number of compilations. By
                default views are only padded to the next multiples of 32, as the reference does; more padding changes
                results slightly, because nothing masks it.
            mesh: batches and weights are split over it, see `Engine`; on several hosts all call with the same images.

        Raises:
            ValueError: five views of a model without view association, or an option out of range.
        """
        associates = model.config.association is not None
        self.views = views if views is not None else (5 if associates else 1)
        if self.views not in (1, 5):
            raise ValueError(f"views is {self.views}; choose 1 (whole image) or 5 (whole image and four corners)")
        if self.views == 5 and not associates:
            raise ValueError("this model has no view association (it is a plain Mask2Former); use views=1")
        if not 32 <= min_size <= max_size:
            raise ValueError(f"min_size {min_size} and max_size {max_size}: need 32 <= min_size <= max_size")
        self.buckets = tuple((int(height), int(width)) for height, width in buckets)
        if any(side % 32 or side < 32 for bucket in self.buckets for side in bucket):
            raise ValueError(f"buckets {list(self.buckets)}: sides must be positive multiples of 32")
        self.min_size, self.max_size = min_size, max_size
        self.score_mode = ScoreMode(score_mode)
        self.max_entities = max_entities
        self.num_classes = model.config.mask_decoder.num_classes
        self._engine = Engine(model, mesh)
        self._forward = self._engine.per_image(self._run_model, part=lambda model: model)
        self._heads: dict[Any, _Head] = {}

    @classmethod
    def from_checkpoint(
        cls, path: str | Path | None = None, *, dtype: Any = "float32", mesh: Mesh | None = None, **options: Any
    ) -> "Predictor":
        """A predictor with saved weights; None: the demo weights of the package. See `open_bundle`, `from_bundle`."""
        return cls.from_bundle(open_bundle(path or demo_checkpoint(), dtype=dtype, mesh=mesh), **options)

    @classmethod
    def from_bundle(cls, bundle: Bundle, **options: Any) -> "Predictor":
        """A predictor with the weights of a file or of a run in progress.

        `bundle.info["inference"]` may hold defaults for `min_size`, `max_size` and `views`.

        Args:
            bundle: the model, placed on the mesh on which it will run.
            options: of `Predictor`; None for the default.

        Raises:
            ValueError: not a CropFormer, or a wrong option.
        """
        given = {name: value for name, value in options.items() if value is not None}
        return cls(bundle.load_as(CropFormer), **{**bundle.info.get("inference", {}), **given})

    def __call__(self, image: ImageLike) -> EntityPrediction:
        """Entities of one image: a path, or RGB uint8 (h, w, 3).

        Raises:
            FileNotFoundError, ImageError: the file is missing or no readable image.
            ValueError: an array of another shape or type, or a model with several classes.
        """
        return self.predict_batch([image])[0]

    def predict_batch(self, images: Sequence[ImageLike]) -> list[EntityPrediction]:
        """Entities of several images; those of equal padded size run together."""
        results = dict(self.predict_many(images, batch_size=len(images) or 1))
        for result in results.values():
            if isinstance(result, Exception):
                raise result
        return [results[index] for index in range(len(images))]

    def predict_many(
        self,
        images: Iterable[ImageLike],
        *,
        batch_size: int = 1,
        num_threads: int = 2,
        output: str = "entities",
        **options: Any,
    ) -> Iterator[tuple[int, Any]]:
        """Predictions of many images, read ahead in threads; results come in batches of equal padded size.

        Args:
            images: paths or arrays.
            batch_size: images per call of the network, rounded up to what divides over the devices.
            num_threads: threads that read and resize.
            output: "entities", or of class-aware models (views=1) "instances", "panoptic" or "semantic".
            options: of `predict_instances` or `predict_panoptic`.

        Yields:
            (position in `images`, prediction, or the error that kept the image from being read).

        Raises:
            ValueError: an output that the model does not have.
            ImageError: an unreadable image, on a mesh of several processes: they cannot go on without each other.
        """
        head = self._head(output, **options)
        groups = self._groups(images, self._engine.batch_size(batch_size))
        for framed, batch, failed in read_ahead(self._load, groups, num_threads):
            yield from failed
            if framed:
                positions, framings = zip(*framed, strict=True)
                yield from zip(positions, self._run(head, framings, batch), strict=True)

    def predict_instances(self, image: ImageLike, limit: int = 100) -> InstancePrediction:
        """Overlapping instances of a class-aware model (views=1); see `class_aware.instance_masks`."""
        return self._one(image, output="instances", limit=limit)

    def predict_panoptic(
        self, image: ImageLike, is_thing: Sequence[bool], *, score_threshold: float = 0.8, overlap: float = 0.8
    ) -> PanopticPrediction:
        """Panoptic segments of a class-aware model (views=1); see `class_aware.panoptic_masks`."""
        options = dict(is_thing=tuple(is_thing), score_threshold=score_threshold, overlap=overlap)
        return self._one(image, output="panoptic", **options)

    def predict_semantic(self, image: ImageLike) -> np.ndarray:
        """Class of every pixel, int16 (h, w), by a class-aware model (views=1)."""
        return self._one(image, output="semantic")

    def _one(self, image: ImageLike, **options: Any) -> Any:
        ((_, result),) = self.predict_many([image], **options)
        if isinstance(result, Exception):
            raise result
        return result

    # Images to batches.

    def frame(self, image: ImageLike) -> Framing:
        """Where the views of an image lie; of a file only the header is read."""
        original = size_of(image)
        name = f"array of shape {image.shape}" if isinstance(image, np.ndarray) else str(image)
        views = inference_view_list(*original, **self._view_options())
        sizes = [view.size for view in views]
        padded = round_up((max(size[0] for size in sizes), max(size[1] for size in sizes)))
        if self.buckets:
            padded = self.buckets[bucket_index(sizes, self.buckets, name)]
        boxes = np.array([view.box for view in views], np.int32)
        return Framing(np.array(sizes, np.int32), boxes, padded, original)

    def view_pixels(self, image: ImageLike, framing: Framing) -> UInt8[np.ndarray, "t h w 3"]:
        """Crops, resizes and pads an image, on the host."""
        return inference_views(pixels_of(image), padded=framing.padded, **self._view_options())[0]

    def _view_options(self) -> dict[str, int]:
        return dict(num_views=self.views, short_edge=self.min_size, max_size=self.max_size)

    def _groups(self, images: Iterable[ImageLike], size: int):
        """(position, image, framing or error) in groups of equal padded size; the last ones may be smaller."""
        waiting: dict[tuple[int, int], list[tuple[int, ImageLike, Framing]]] = {}
        for index, image in enumerate(images):
            try:
                framing = self.frame(image)
            except (ImageError, FileNotFoundError, ValueError) as error:
                yield [(index, image, error)]
                continue
            group = waiting.setdefault(framing.padded, [])
            group.append((index, image, framing))
            if len(group) == size:
                yield waiting.pop(framing.padded)
        yield from waiting.values()

    def _load(self, group):
        """(position, framing) of the images of a batch, their views, and (position, error) of those without."""
        failed = [(index, found) for index, _, found in group if isinstance(found, Exception)]
        group = [item for item in group if not isinstance(item[2], Exception)]
        own = self._engine.own_rows(self._rows(len(group))) if group else range(0)

        def pixels(row):
            _, image, framing = group[row]
            try:
                return self.view_pixels(image, framing)
            except (ImageError, FileNotFoundError, ValueError) as error:
                if len(own) < self._rows(len(group)):
                    raise
                return error

        loaded = {row: pixels(row) for row in range(len(group)) if row in own}
        failed += [(group[row][0], found) for row, found in loaded.items() if isinstance(found, Exception)]
        kept = [row for row in range(len(group)) if not isinstance(loaded.get(row), Exception)]
        if not kept:
            return [], None, failed
        batch = np.zeros((self._rows(len(kept)), self.views, *group[0][2].padded, 3), np.uint8)
        for place, row in enumerate(kept):
            if row in loaded:
                batch[place] = loaded[row]
        return [(group[row][0], group[row][2]) for row in kept], batch, failed

    def _rows(self, count: int) -> int:
        """Rows of a batch of `count` images: few numbers, so that few programs are compiled."""
        shards = self._engine.batch_size(1)
        return shards * power_of_two(-(-count // shards)) if count else 0

    # Batches to predictions.

    def _run(self, head: "_Head", framings: Sequence[Framing], batch: np.ndarray) -> list[Any]:
        size, box = (np.stack([getattr(framing, name) for framing in framings]) for name in ("size_t2", "box_t4"))
        logits, masks = self._forward(batch, fill(size, len(batch)))
        padded, originals = framings[0].padded, [framing.original for framing in framings]
        canvas = make_canvas(padded if head.upsampled else masks.shape[-2:], padded, size, box, originals)
        canvas = jax.tree.map(lambda table: fill(table, len(batch)), canvas)
        canvas.tiles[len(originals) :] = 0  # nothing to paint in what fills the batch up
        return head.finish(self._engine.fetch(head.program(logits, masks, canvas)), originals)

    def _head(self, output: str, **options: Any) -> "_Head":
        key = (output, repr(sorted(options.items())))
        if key not in self._heads:
            if output not in ("entities", "instances", "panoptic", "semantic"):
                raise ValueError(f"output is {output!r}; choose entities, instances, panoptic or semantic")
            if output == "entities" and self.num_classes != 1:
                raise ValueError(
                    f"this model has {self.num_classes} classes; use predict_instances, predict_panoptic or "
                    "predict_semantic"
                )
            if output != "entities" and self.views != 1:
                raise ValueError("class-aware inference sees the whole image only; create the predictor with views=1")
            self._heads[key] = getattr(self, f"_{output}")(**options)
        return self._heads[key]

    def _entities(self) -> "_Head":
        chunk = 2 if self._engine.mesh.devices.flat[0].platform == "cpu" else 16
        limit = self.max_entities if self.views == 1 else None

        def program(logits, masks, canvas):
            class_score = jax.nn.softmax(logits)[..., 0]
            return paint(class_score, masks, canvas, score_mode=self.score_mode, chunk=chunk)

        return _Head(self._engine.per_image(program), lambda painted, sizes: painted.to_predictions(sizes, limit))

    def _instances(self, limit: int = 100) -> "_Head":
        def program(logits, masks, canvas):
            return class_aware.instance_masks(logits, masks[:, :, 0], canvas, limit=limit)

        return _Head(self._engine.per_image(program), class_aware.to_instances)

    def _panoptic(self, is_thing: Sequence[bool], score_threshold: float = 0.8, overlap: float = 0.8) -> "_Head":
        if len(is_thing) != self.num_classes:
            raise ValueError(f"is_thing has {len(is_thing)} entries, the model has {self.num_classes} classes")

        def program(logits, masks, canvas):
            return class_aware.panoptic_masks(logits, masks[:, :, 0], canvas, score_threshold=score_threshold)

        finish = partial(class_aware.to_panoptic, is_thing=np.asarray(is_thing, bool), overlap_threshold=overlap)
        return _Head(self._engine.per_image(program), finish)

    def _semantic(self) -> "_Head":
        def program(logits, masks, canvas):
            padded = tuple(4 * side for side in masks.shape[-2:])
            scores = class_aware.semantic_scores(logits, masks[:, :, 0], padded=padded)
            return class_aware.semantic_labels(scores, canvas)

        def finish(labels, originals):
            return [labels[row, :height, :width] for row, (height, width) in enumerate(originals)]

        return _Head(self._engine.per_image(program), finish, upsampled=True)

    def _run_model(self, model: CropFormer, image_bthwc, size_bt2):
        """Class logits (b, q, k) and mask logits (b, q, t, h, w)."""
        output = model(image_bthwc, size_bt2, all_predictions=False)
        if self.views == 1:
            return output.image.logits[-1], output.image_mask_logits().swapaxes(1, 2)
        return output.batch.logits[-1], output.batch_mask_logits()


@dataclasses.dataclass(frozen=True)
class _Head:
    """From class and mask logits to one kind of prediction.

    Attributes:
        program: of logits, mask logits and canvas.
        finish: from its results on the host, and the sizes of the images, to their predictions.
        upsampled: the canvas is made for maps of the size of the network's input, not of its mask logits.
    """

    program: Program
    finish: Callable[[Any, Sequence[tuple[int, int]]], list[Any]]
    upsampled: bool = False
