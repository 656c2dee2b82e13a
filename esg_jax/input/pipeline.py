"""Grain pipelines: annotated sources to an endless, resumable stream of fixed-shape numpy batches.

Every step of `train_dataset` is a random-access map, so batch i depends on the configuration and i alone: restarting
at step i gives the same batches. The order of the steps matters in two places.

* Images are shuffled, repeated, augmented (the random numbers depend on the position in that stream) and only then
  dealt out to the hosts, so that every epoch shows each image once over all hosts, also when the counts do not
  divide, and the hosts draw unrelated augmentations.
* Sources are mixed after that. A slice `[k::n]` of a mixture could give a host one source only.

Static shapes: an image goes to the smallest bucket that holds its views at the largest shortest edge. Buckets are
separate streams, batched, then interleaved in proportion to their images, in the same order on every host.
"""

import dataclasses
import functools
import logging
from collections.abc import Mapping
from typing import Any

import grain
import numpy as np
from absl import flags

from esg_jax.config import from_dict
from esg_jax.input import (
    mappers,
    packed,  # noqa: F401 (registers its reader)
    transforms,
)
from esg_jax.input.readers import SourceConfig, open_source
from esg_jax.input.records import RecordSource
from esg_jax.ops.padding import check_pad_position

logger = logging.getLogger(__name__)

MAPPERS = ("entity_crop", "entity_full", "lsj", "colormap")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Training data.

    sources: a dictionary of `SourceConfig` fields under a name of your choice each; weights are relative.
    mapper: "entity_crop" (whole image and one corner crop, CropFormer), "entity_full" (whole image only), "lsj"
        (large-scale jitter, Mask2Former) or "colormap" (image and label map, GELLA's reconstruction).
    short_edges, max_size: pixels; for the entity mappers.
    buckets: padded (height, width), multiples of 32; for the entity mappers.
    zoom: smallest and largest magnification of large-scale jitter before the views are made, log-uniform; (1, 1) for
        none. Above 1 a random window is seen, below 1 the picture shrinks and gets a gray surround; the size of the
        views stays. For the entity mappers.
    colour: strength of the colour jitter, 0 (none) to 1 (that of SSD), see `augment`; for the entity mappers.
    lsj_size, lsj_scales: for "lsj".
    image_size, map_size: sides of the squares in pixels, for "colormap".
    pad_position: where the squares are padded, "bottom_right" or on all sides ("center"), for "colormap".
    max_entities: target slots N per image; the largest entities are kept.
    class_agnostic: all labels 0.
    drop_empty: leave out images without entities, as the reference does.
    batch_size: images per step over all hosts.
    num_workers: processes that prepare batches; 0 prepares them in threads of this process.
    num_threads, prefetch: threads (per process) and batches prepared ahead.
    """

    sources: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mapper: str = "entity_crop"
    short_edges: tuple[int, ...] = (640, 672, 704, 736, 768, 800)
    max_size: int = 1333
    buckets: tuple[tuple[int, int], ...] = ((800, 1088), (1088, 800), (800, 1344), (1344, 800))
    zoom: tuple[float, float] = (1.0, 1.0)
    colour: float = 0.0
    lsj_size: int = 1024
    lsj_scales: tuple[float, float] = (0.1, 2.0)
    image_size: int = 336
    map_size: int = 1024
    pad_position: str = "bottom_right"
    max_entities: int = 100
    class_agnostic: bool = True
    drop_empty: bool = True
    batch_size: int = 16
    seed: int = 0
    num_workers: int = 0
    num_threads: int = 2
    prefetch: int = 2

    def __post_init__(self):
        if self.mapper not in MAPPERS:
            raise ValueError(f"data.mapper is {self.mapper!r}; choose one of {', '.join(MAPPERS)}")
        check_pad_position(self.pad_position, "data.pad_position")
        # Lists come from JSON and from command-line overrides.
        object.__setattr__(self, "buckets", tuple(tuple(bucket) for bucket in self.buckets))
        for name in ("short_edges", "zoom", "lsj_scales"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.zoom) != 2 or not 0 < self.zoom[0] <= self.zoom[1]:
            raise ValueError(f"data.zoom is {self.zoom}; it must be (MIN, MAX) with 0 < MIN <= MAX")
        if not 0 <= self.colour <= 1:
            raise ValueError(f"data.colour is {self.colour}; it is a strength from 0 to 1")
        if self.mapper in ("lsj", "colormap") and (self.zoom != (1, 1) or self.colour):
            raise ValueError(f"data.zoom and data.colour are for the entity mappers, not for {self.mapper!r}")
        for name in ("buckets", "lsj_size", "map_size"):
            if np.any(np.asarray(getattr(self, name)) % 32):
                raise ValueError(f"data.{name} is {getattr(self, name)}; sides must be multiples of 32")
        # Every field of a source is spelled out, so that the command line can override each.
        sources = {name: dataclasses.asdict(source) for name, source in self.source_configs().items()}
        object.__setattr__(self, "sources", sources)

    def source_configs(self) -> dict[str, SourceConfig]:
        """The sources as dataclasses. Raises ValueError with the full path of an unknown field."""
        return {
            name: value if isinstance(value, SourceConfig) else from_dict(SourceConfig, value, f"data.sources.{name}")
            for name, value in self.sources.items()
        }


@dataclasses.dataclass(frozen=True)
class EvalDataConfig:
    """Evaluation data: one source, in order.

    num_views: 1 (whole image) or 5 (and the four corner crops).
    buckets: padded sizes to keep the number of compiled shapes small; empty pads to the next multiples of 32.
    """

    source: SourceConfig = SourceConfig()
    num_views: int = 5
    short_edge: int = 800
    max_size: int = 1333
    buckets: tuple[tuple[int, int], ...] = ()
    num_threads: int = 2
    prefetch: int = 4


def train_iterator(config: DataConfig, process_index: int = 0, process_count: int = 1) -> grain.DatasetIterator:
    """Endless batches (the batch contract: see `mappers`, plus a leading batch axis) of this host.

    The iterator has `get_state`/`set_state` and can be handed to Orbax as it is. Close it when done (`close()`), so
    that its worker processes end.

    Raises:
        ValueError, FileNotFoundError: a problem with the configuration or an annotation file; while iterating, with
            an image or a mask. The message names the field or file.
    """
    return endless(train_dataset(config, process_index, process_count), config)


def endless(dataset: grain.MapDataset, config: Any) -> grain.DatasetIterator:
    """Iterator over a training dataset, with the threads and processes that `config` asks for.

    Args:
        dataset: of batches.
        config: has `num_workers`, `num_threads` and `prefetch`, see `DataConfig`.
    """
    options = grain.ReadOptions(num_threads=config.num_threads, prefetch_buffer_size=config.prefetch)
    iterator = dataset.to_iter_dataset(options)
    if config.num_workers:
        # Grain's worker start reads absl flags, which only absl programs have parsed by now.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        iterator = iterator.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=config.num_workers, per_worker_buffer_size=config.prefetch)
        )
    return iter(iterator)


def train_dataset(config: DataConfig, process_index: int = 0, process_count: int = 1) -> grain.MapDataset:
    """The random-access dataset behind `train_iterator`: element i is the host's i-th batch."""
    if not config.sources:
        raise ValueError("data.sources is empty; name at least one source")
    if config.batch_size % process_count:
        raise ValueError(f"data.batch_size {config.batch_size} does not divide among {process_count} hosts")
    streams: dict[int, list[tuple[grain.MapDataset, float]]] = {}
    source_configs = config.source_configs()
    # The mark is there only where it says something; label maps to reconstruct are complete by themselves.
    marked = config.mapper != "colormap" and not all(s.exhaustive for s in source_configs.values() if s.weight > 0)
    for number, (name, source_config) in enumerate(source_configs.items()):
        if source_config.weight <= 0:
            continue
        source = open_source(source_config)
        rows_by_bucket = _bucket_rows(config, source, name)
        total = sum(len(rows) for rows in rows_by_bucket.values())
        for bucket, rows in rows_by_bucket.items():
            stream = grain.MapDataset.source(_Subset(source, rows))
            stream = stream.seed(seed_of(config.seed, number, bucket)).shuffle().repeat()
            stream = stream.random_map(_mapper(config, bucket))[process_index::process_count]
            if marked:
                stream = stream.map(mappers.MarkExhaustive(source_config.exhaustive))
            streams.setdefault(bucket, []).append((stream, source_config.weight * len(rows) / total))
    if not streams:
        raise ValueError("every source of data.sources has weight 0")
    batches, weights = [], []
    for bucket in sorted(streams):
        mixed = _mix([stream for stream, _ in streams[bucket]], [weight for _, weight in streams[bucket]])
        batches.append(mixed.batch(config.batch_size // process_count, drop_remainder=True))
        weights.append(sum(weight for _, weight in streams[bucket]))
    return _mix(batches, weights)


def eval_dataset(config: EvalDataConfig, process_index: int = 0, process_count: int = 1) -> grain.IterDataset:
    """`mappers.EvalExample` of every image of this host's share, in the order of the file."""
    views = mappers.InferenceViews(config.num_views, config.short_edge, config.max_size, config.buckets)
    dataset = grain.MapDataset.source(open_source(config.source))[process_index::process_count].map(views)
    return dataset.to_iter_dataset(
        grain.ReadOptions(num_threads=config.num_threads, prefetch_buffer_size=config.prefetch)
    )


@dataclasses.dataclass(frozen=True)
class _Subset:
    """Chosen rows of a source, as a Grain random-access source."""

    source: RecordSource
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int):
        return self.source[int(self.rows[index])]


def _bucket_rows(config: DataConfig, source: RecordSource, name: str) -> dict[int, np.ndarray]:
    """Rows of the source by bucket; logs what is left out or cut."""
    counts = source.num_entities
    rows = np.flatnonzero(counts != 0) if config.drop_empty else np.arange(len(source))
    if len(rows) == 0:
        raise ValueError(f"data.sources.{name} has no image{' with entities' if config.drop_empty else ''}")
    cut = int((counts > config.max_entities).sum())
    logger.info(
        "data source %s: %d images, %d of them without entities%s; %d have more than %d entities, of which the "
        "largest are kept", name, len(source), int((counts == 0).sum()), " (left out)" if config.drop_empty else "",
        cut, config.max_entities,
    )  # fmt: skip
    if config.mapper in ("lsj", "colormap"):
        return {0: rows}
    buckets = np.array([_bucket_of(config, *source.sizes[row].tolist(), name) for row in rows])
    return {int(bucket): rows[buckets == bucket] for bucket in np.unique(buckets)}


def _bucket_of(config: DataConfig, height: int, width: int, name: str) -> int:
    shape = (config.short_edges, config.max_size, config.buckets)
    return _bucket_of_size(height, width, *shape, f"of {height}x{width} in data.sources.{name}")


@functools.lru_cache(maxsize=100_000)
def _bucket_of_size(height, width, short_edges, max_size, buckets, name) -> int:
    views = [transforms.full_view(height, width, edge, max_size) for edge in short_edges]
    views += [transforms.crop_view(height, width, 0, edge, max_size) for edge in short_edges]
    return mappers.bucket_index([view.size for view in views], buckets, name)


def _mapper(config: DataConfig, bucket: int):
    if config.mapper == "lsj":
        return mappers.LargeScaleJitter(config.lsj_size, config.max_entities, config.lsj_scales, config.class_agnostic)
    if config.mapper == "colormap":
        return mappers.Colormap(config.image_size, config.map_size, config.max_entities, config.pad_position)
    return mappers.EntityCrop(
        config.short_edges,
        config.max_size,
        config.buckets[bucket],
        config.max_entities,
        config.class_agnostic,
        crop=config.mapper == "entity_crop",
        zoom=config.zoom,
        colour=config.colour,
    )


def _mix(datasets: list[grain.MapDataset], weights: list[float]) -> grain.MapDataset:
    return datasets[0] if len(datasets) == 1 else grain.MapDataset.mix(datasets, weights)


def seed_of(*parts: int) -> int:
    """One seed from several numbers, unrelated for different ones."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
