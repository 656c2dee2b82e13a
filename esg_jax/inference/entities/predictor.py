"""Images in, masks out."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import UInt8

import esg_jax
from esg_jax.inference.entities import class_aware
from esg_jax.inference.entities.canvas import Canvas, make_canvas, power_of_two
from esg_jax.inference.entities.painting import paint
from esg_jax.inference.entities.predictions import EntityPrediction, InstancePrediction, PanopticPrediction
from esg_jax.inference.entities.scores import ScoreMode
from esg_jax.input.image_io import ImageError, load_image
from esg_jax.input.mappers import bucket_index
from esg_jax.input.transforms import inference_view_list, inference_views, round_up
from esg_jax.models.cropformer import CropFormer
from esg_jax.weights import is_weights_file, packaged_weights, read_info

ImageLike = str | Path | UInt8[np.ndarray, "h w 3"]


class Views(NamedTuple):
    """Network input of one image: padded views, their sizes, their boxes in it, and its (height, width)."""

    image_thwc: np.ndarray
    size_t2: np.ndarray
    box_t4: np.ndarray
    original: tuple[int, int]


def demo_checkpoint() -> Path:
    """The weights that ship with the package.

    Raises:
        FileNotFoundError: this installation has none.
    """
    return packaged_weights(
        "demo.safetensors",
        "name a checkpoint (--checkpoint FILE.safetensors), convert a published one (`esg convert --help`), or train a "
        "small one (`make quickstart`)",
    )


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
        devices: Sequence[jax.Device] | None = None,
    ):
        """Prepares inference; the first image of every padded size takes a compilation.

        Args:
            model: a CropFormer or a plain Mask2Former.
            views: 5 (whole image and four corner crops, batch level) or 1 (whole image, image level). By default 5 if
                the model associates views.
            min_size, max_size: of the shortest-edge resize of every view, in pixels.
            score_mode: see `ScoreMode`.
            max_entities: most rows returned with one view (five views return all queries, as the reference does).
            buckets: padded (height, width) to choose from, multiples of 32, to bound the number of compilations. By
                default views are only padded to the next multiples of 32, as the reference does; more padding changes
                results slightly, because nothing masks it.
            devices: batches are split over these; by default one device.

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
        self.devices = list(devices) if devices is not None else jax.devices()[:1]
        self._mesh = Mesh(np.array(self.devices), ("data",))
        self._graph, state = nnx.split(model)
        replicated = jax.sharding.NamedSharding(self._mesh, PartitionSpec())
        self._state = jax.device_put(state, replicated)
        chunk = 2 if self.devices[0].platform == "cpu" else 16
        self._forward = self._over_devices(self._run_model, replicated_arguments=1)
        self._paint = self._over_devices(partial(paint, score_mode=self.score_mode, chunk=chunk))

    @classmethod
    def from_checkpoint(cls, path: str | Path | None = None, *, dtype=jnp.float32, **options: Any) -> "Predictor":
        """A predictor with saved weights.

        `info["inference"]` of weights of ours may hold defaults for `min_size`, `max_size` and `views`.

        Args:
            path: anything `esg_jax.load` reads: weights of ours, or a PyTorch checkpoint in one of the formats of
                `esg convert`. None for the demo weights of the package.
            dtype: of the computation; bfloat16 is faster on accelerators.
            options: of `Predictor`.

        Raises:
            FileNotFoundError: no such file, or no demo weights in this installation.
            ValueError: not a usable checkpoint, or a wrong option.
        """
        path = Path(path) if path is not None else demo_checkpoint()
        defaults = read_info(path)[1].get("inference", {}) if is_weights_file(path) else {}
        given = {name: value for name, value in options.items() if value is not None}
        model = esg_jax.load(path, dtype=dtype)
        if not isinstance(model, CropFormer):
            raise ValueError(f"{path} holds a {type(model).__name__}, not a CropFormer")
        return cls(model, **{**defaults, **given})

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
        self, images: Iterable[ImageLike], *, batch_size: int = 1, num_threads: int = 2
    ) -> Iterator[tuple[int, EntityPrediction | Exception]]:
        """Entities of many images, read ahead in threads; results come in batches of equal padded size.

        Args:
            images: paths or arrays.
            batch_size: images per call of the network.
            num_threads: threads that read and resize.

        Yields:
            (position in `images`, prediction, or the error that kept the image from being read).

        Raises:
            ValueError: the model has several classes.
        """
        if self.num_classes != 1:
            raise ValueError(
                f"this model has {self.num_classes} classes; use predict_instances, predict_panoptic or "
                "predict_semantic"
            )
        waiting: dict[tuple[int, ...], list[tuple[int, Views]]] = {}
        for index, views in _read_ahead(self.prepare, images, num_threads, ahead=batch_size + num_threads):
            if isinstance(views, Exception):
                yield index, views
                continue
            group = waiting.setdefault(views.image_thwc.shape, [])
            group.append((index, views))
            if len(group) == batch_size:
                yield from self._finish(waiting.pop(views.image_thwc.shape))
        for group in waiting.values():
            yield from self._finish(group)

    def predict_instances(self, image: ImageLike, limit: int = 100) -> InstancePrediction:
        """Overlapping instances of a class-aware model (views=1); see `class_aware.instance_masks`."""
        views = self._single_view(image)
        logits, masks = self._outputs([views])
        canvas = self._canvas([views], masks.shape[-2:])
        outputs = class_aware.instance_masks(logits, masks[:, :, 0], canvas, limit=limit)
        return class_aware.to_instances(outputs, [views.original])[0]

    def predict_panoptic(
        self, image: ImageLike, is_thing: Sequence[bool], *, score_threshold: float = 0.8, overlap: float = 0.8
    ) -> PanopticPrediction:
        """Panoptic segments of a class-aware model (views=1); see `class_aware.panoptic_masks`."""
        if len(is_thing) != self.num_classes:
            raise ValueError(f"is_thing has {len(is_thing)} entries, the model has {self.num_classes} classes")
        views = self._single_view(image)
        logits, masks = self._outputs([views])
        canvas = self._canvas([views], masks.shape[-2:])
        outputs = class_aware.panoptic_masks(logits, masks[:, :, 0], canvas, score_threshold=score_threshold)
        return class_aware.to_panoptic(outputs, [views.original], np.asarray(is_thing, bool), overlap)[0]

    def predict_semantic(self, image: ImageLike) -> np.ndarray:
        """Class of every pixel, int16 (h, w), by a class-aware model (views=1)."""
        views = self._single_view(image)
        logits, masks = self._outputs([views])
        padded = views.image_thwc.shape[1:3]
        scores = class_aware.semantic_scores(logits, masks[:, :, 0], padded=padded)
        labels = class_aware.semantic_labels(scores, self._canvas([views], padded))
        height, width = views.original
        return np.asarray(labels[0, :height, :width])

    def prepare(self, image: ImageLike) -> Views:
        """Reads, crops, resizes and pads one image, on the host."""
        if isinstance(image, np.ndarray):
            name = f"array of shape {image.shape}"
            if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8 or 0 in image.shape:
                raise ValueError(f"expected an RGB uint8 array (height, width, 3), got {image.dtype} {image.shape}")
        else:
            name, image = str(image), load_image(image)
        height, width = image.shape[:2]
        options = dict(num_views=self.views, short_edge=self.min_size, max_size=self.max_size)
        sizes = [view.size for view in inference_view_list(height, width, **options)]
        padded = round_up((max(size[0] for size in sizes), max(size[1] for size in sizes)))
        if self.buckets:
            padded = self.buckets[bucket_index(sizes, self.buckets, name)]
        return Views(*inference_views(image, padded=padded, **options), (height, width))

    def _single_view(self, image: ImageLike) -> Views:
        if self.views != 1:
            raise ValueError("class-aware inference sees the whole image only; create the predictor with views=1")
        return self.prepare(image)

    def _finish(self, group: list[tuple[int, Views]]) -> Iterator[tuple[int, EntityPrediction]]:
        indices, views = zip(*group, strict=True)
        logits, masks = self._outputs(views)
        canvas = self._canvas(views, masks.shape[-2:], len(masks))
        painted = self._paint(jax.nn.softmax(logits)[..., 0], masks, canvas)
        limit = self.max_entities if self.views == 1 else None
        yield from zip(indices, painted.to_predictions([item.original for item in views], limit), strict=True)

    def _canvas(self, views: Sequence[Views], cells: tuple[int, int], count: int = 1) -> Canvas:
        sizes, boxes = (np.stack([getattr(item, name) for item in views]) for name in ("size_t2", "box_t4"))
        canvas = make_canvas(cells, views[0].image_thwc.shape[1:3], sizes, boxes, [item.original for item in views])
        canvas = jax.tree.map(lambda table: _fill(table, count), canvas)
        canvas.tiles[len(views) :] = 0  # nothing to paint in what fills the batch up
        return canvas

    def _outputs(self, views: Sequence[Views]) -> tuple[jax.Array, jax.Array]:
        """Class logits (b, q, k) and mask logits (b, q, t, h, w) of the batch, filled up to a size that has a program.

        Sizes are powers of two times the number of devices.
        """
        devices = len(self.devices)
        count = devices * power_of_two(-(-len(views) // devices))
        image, size = (
            _fill(np.stack([getattr(item, name) for item in views]), count) for name in ("image_thwc", "size_t2")
        )
        return self._forward(self._state, image, size)

    def _run_model(self, state, image_bthwc, size_bt2):
        output = nnx.merge(self._graph, state)(image_bthwc, size_bt2, all_predictions=False)
        if self.views == 1:
            return output.image.logits[-1], output.image_mask_logits().swapaxes(1, 2)
        return output.batch.logits[-1], output.batch_mask_logits()

    def _over_devices(self, function, replicated_arguments: int = 0):
        """Compiles `function`; every device gets its share of the batch."""

        def split(*arguments):
            batch = PartitionSpec("data")
            specs = [PartitionSpec()] * replicated_arguments + [batch] * (len(arguments) - replicated_arguments)
            mapped = jax.shard_map(function, mesh=self._mesh, in_specs=tuple(specs), out_specs=batch, check_vma=False)
            return mapped(*arguments)

        return jax.jit(split)


def _fill(array: np.ndarray, count: int) -> np.ndarray:
    """Repeats the last item until there are `count`."""
    return np.concatenate([array, np.repeat(array[-1:], count - len(array), axis=0)])


def _read_ahead(function, items, num_threads: int, ahead: int):
    """(index, function(item) or the error about a bad image) in order, with `ahead` items in flight."""
    with ThreadPoolExecutor(num_threads) as pool:
        source = enumerate(items)
        pending = [(index, pool.submit(function, item)) for index, item in islice(source, ahead)]
        while pending:
            index, job = pending.pop(0)
            try:
                result = job.result()
            except (ImageError, FileNotFoundError, ValueError) as error:
                result = error
            pending.extend((index, pool.submit(function, item)) for index, item in islice(source, 1))
            yield index, result
