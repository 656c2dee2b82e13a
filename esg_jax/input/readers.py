"""Readers of annotation files: COCO instances (EntitySeg), COCO panoptic, semantic label maps.

A reader is a class that takes a `SourceConfig` and gives a `RecordSource`; `register_reader` adds one under the name
that configs use. Annotations stay as bytes until a record is decoded, so that a source with millions of masks is
cheap to hold and to hand to worker processes.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from esg_jax.input import image_io
from esg_jax.input.records import Entities, Record, RecordSource
from esg_jax.masks import rle
from esg_jax.masks.layers import label_layers
from esg_jax.masks.read import ids_from_rgb


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Where one data set lies and how often it is drawn.

    reader: name of a registered reader.
    annotations: the annotation file (JSON, or the list file of semantic maps).
    images: folder that the image file names are relative to; by default the folder of the annotation file.
    masks: folder of the PNG label maps (panoptic and semantic readers); by default the annotation file without its
        suffix, as in an official COCO download.
    weight: share of this source in a mixture.
    exhaustive: every entity of its images is annotated. Of False, training learns the annotated ones and charges no
        prediction for finding something else.
    """

    reader: str = "coco_instances"
    annotations: str = ""
    images: str = ""
    masks: str = ""
    weight: float = 1.0
    exhaustive: bool = True


_READERS: dict[str, Callable[[SourceConfig], RecordSource]] = {}


def register_reader(name: str) -> Callable:
    """Class decorator: makes a reader available as ``SourceConfig(reader=name)``."""

    def register(reader):
        if name in _READERS:
            raise ValueError(f"reader {name!r} is already registered")
        _READERS[name] = reader
        return reader

    return register


def open_source(config: SourceConfig) -> RecordSource:
    """Reads the index of a data set.

    Raises:
        ValueError: unknown reader, or malformed annotations (file and id are named).
        FileNotFoundError: no annotation file or image folder.
    """
    if config.reader not in _READERS:
        raise ValueError(f"unknown reader {config.reader!r}; choose one of {', '.join(sorted(_READERS))}")
    return _READERS[config.reader](config)


@dataclasses.dataclass(frozen=True)
class CocoRecord(Record):
    annotations: bytes  # JSON list of [id, label, crowd, segmentation]
    file: str

    def load_entities(self) -> Entities:
        annotations = json.loads(self.annotations)
        size, image = (self.height, self.width), f"image {self.name}"
        counts = [
            rle.runs_of(segmentation, size, f"{self.file}: annotation {annotation_id} of {image}")
            for annotation_id, _, _, segmentation in annotations
        ]
        return Entities(
            layers=label_layers(counts, *size),
            labels=np.array([label for _, label, _, _ in annotations], np.int32),
            crowd=np.array([crowd for _, _, crowd, _ in annotations], bool),
            ids=tuple(annotation_id for annotation_id, _, _, _ in annotations),
        )


@register_reader("coco_instances")
class CocoInstances:
    """COCO instance JSON with polygons or RLE; also the EntitySeg files.

    Raises:
        ValueError: no ``images``/``annotations``/``categories`` list, an annotation of an unknown image or category,
            an RLE of another size than its image, an id used twice. The message names file and id.
        FileNotFoundError: no annotation file or image folder.
    """

    def __init__(self, config: SourceConfig, content: Mapping[str, Any] | None = None):
        """`content`: what the file holds, when it has been read already."""
        self.file = config.annotations
        content = read_json(self.file) if content is None else content
        self._folder = _image_folder(config)
        self._images = _images_by_id(content, self.file)
        self.categories, label_of = _categories(content, self.file)
        grouped: dict[Any, list] = {image_id: [] for image_id in self._images}
        for annotation in list_of(content, "annotations", self.file):
            name = f"{self.file}: annotation {annotation.get('id', '(without id)')}"
            for key in ("image_id", "category_id", "segmentation"):
                if key not in annotation:
                    raise ValueError(f"{name} has no {key!r}")
            image = self._images.get(annotation["image_id"])
            if image is None:
                raise ValueError(f"{name} belongs to image id {annotation['image_id']}, which 'images' does not list")
            if annotation["category_id"] not in label_of:
                raise ValueError(f"{name} has category id {annotation['category_id']}, which 'categories' lacks")
            segmentation = annotation["segmentation"]
            if isinstance(segmentation, Mapping) and tuple(segmentation.get("size", ())) != _size(image):
                raise ValueError(
                    f"{name} has an RLE of size {segmentation.get('size')}, its image {image['file_name']} has "
                    f"{list(_size(image))} (height, width)"
                )
            entry = (annotation.get("id"), label_of[annotation["category_id"]], int(annotation.get("iscrowd", 0)))
            grouped[annotation["image_id"]].append((*entry, segmentation))
        self._ids = list(self._images)
        self.num_entities = np.array([sum(not e[2] for e in grouped[i]) for i in self._ids], np.int32)
        self.sizes = np.array([_size(self._images[i]) for i in self._ids], np.int32).reshape(-1, 2)
        self._blobs = [json.dumps(grouped.pop(image_id)).encode() for image_id in self._ids]

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> CocoRecord:
        image = self._images[self._ids[index]]
        return CocoRecord(
            self._folder / image["file_name"],
            image["file_name"],
            image["id"],
            *_size(image),
            self._blobs[index],
            self.file,
        )

    def __repr__(self) -> str:
        return f"CocoInstances({self.file}, {len(self)} images)"


@dataclasses.dataclass(frozen=True)
class PanopticRecord(Record):
    """Segments in a PNG with ids coded as R + 256 G + 65536 B; id 0 is unlabelled."""

    mask_file: Path
    segment_ids: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray

    def load_entities(self) -> Entities:
        ids_hw = ids_from_rgb(image_io.load_image(self.mask_file))
        _check_map_size(self, self.mask_file, ids_hw)
        layer = _rank_map(ids_hw, self.segment_ids)
        unknown = ids_hw[(layer == 0) & (ids_hw != 0)]
        if unknown.size:
            raise ValueError(f"{self.mask_file}: segment id {unknown[0]} is in the PNG but not in 'segments_info'")
        counts = np.bincount(layer.ravel(), minlength=len(self.segment_ids) + 1)[1:]
        if (counts == 0).any():
            missing = self.segment_ids[np.flatnonzero(counts == 0)[0]]
            raise ValueError(f"{self.mask_file}: no pixel has segment id {missing} of 'segments_info'")
        ids = tuple(self.segment_ids.tolist())
        return Entities(layers=[layer], ids=ids, labels=self.labels, crowd=self.crowd)


@dataclasses.dataclass(frozen=True)
class SemanticRecord(Record):
    """Classes as gray values of a PNG; 255 is unlabelled."""

    mask_file: Path

    def load_entities(self) -> Entities:
        values_hw = image_io.load_label_map(self.mask_file)
        _check_map_size(self, self.mask_file, values_hw)
        classes = np.unique(values_hw)
        classes = classes[classes != 255]
        layer = _rank_map(values_hw, classes)
        columns = {"labels": classes.astype(np.int32), "crowd": np.zeros(len(classes), bool)}
        return Entities(layers=[layer], ids=tuple(classes.tolist()), **columns)


def _check_map_size(record: Record, file: Path, map_hw: np.ndarray) -> None:
    if map_hw.shape != (record.height, record.width):
        raise ValueError(
            f"label map {file} is {map_hw.shape[0]}x{map_hw.shape[1]} pixels, "
            f"image {record.name} is {record.height}x{record.width} (height x width)"
        )


def _rank_map(ids_hw: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """k + 1 where the map holds ids[k], 0 where it holds none of them."""
    order = np.argsort(ids)
    table = np.append(ids[order], -1)  # never matches, and gives every insertion point an entry
    place = np.searchsorted(table[:-1], ids_hw)
    ranks = np.append(order + 1, 0).astype(np.uint8 if len(ids) < 255 else np.int32)
    return np.where(table[place] == ids_hw, ranks[place], ranks.dtype.type(0))


@register_reader("coco_panoptic")
class CocoPanoptic:
    """COCO panoptic JSON with its folder of PNGs; every segment is one entity, id 0 is unlabelled.

    Raises: as `CocoInstances`.
    """

    def __init__(self, config: SourceConfig):
        self.file = config.annotations
        content = read_json(self.file)
        self._folder = _image_folder(config)
        self._masks = Path(config.masks) if config.masks else Path(self.file).with_suffix("")
        if not self._masks.is_dir():
            raise FileNotFoundError(f"folder of panoptic PNGs not found: {self._masks} (set SourceConfig.masks)")
        self._images = _images_by_id(content, self.file)
        self.categories, label_of = _categories(content, self.file)
        ranked = sorted(content["categories"], key=lambda category: category["id"])
        self.is_thing = tuple(bool(category.get("isthing", 1)) for category in ranked)
        self._entries: list[tuple[Any, str, np.ndarray, np.ndarray, np.ndarray]] = []
        for annotation in list_of(content, "annotations", self.file):
            if annotation.get("image_id") not in self._images:
                raise ValueError(
                    f"{self.file}: annotation {annotation.get('file_name')} belongs to image id "
                    f"{annotation.get('image_id')}, which 'images' does not list"
                )
            if not isinstance(annotation.get("segments_info"), list):
                raise ValueError(f"{self.file}: annotation {annotation.get('file_name')} has no list 'segments_info'")
            segments = annotation["segments_info"]
            for segment in segments:
                if segment["category_id"] not in label_of:
                    raise ValueError(
                        f"{self.file}: segment {segment['id']} of {annotation['file_name']} has category id "
                        f"{segment['category_id']}, which 'categories' lacks"
                    )
            ids = np.array([segment["id"] for segment in segments], np.int64)
            labels = np.array([label_of[segment["category_id"]] for segment in segments], np.int32)
            crowd = np.array([segment.get("iscrowd", 0) for segment in segments], bool)
            self._entries.append((annotation["image_id"], annotation["file_name"], ids, labels, crowd))
        self.num_entities = np.array([int((~entry[4]).sum()) for entry in self._entries], np.int32)
        self.sizes = np.array([_size(self._images[entry[0]]) for entry in self._entries], np.int32).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> PanopticRecord:
        image_id, mask_name, ids, labels, crowd = self._entries[index]
        image = self._images[image_id]
        name = image["file_name"]
        path, mask = self._folder / name, self._masks / mask_name
        return PanopticRecord(path, name, image_id, *_size(image), mask, ids, labels, crowd)

    def __repr__(self) -> str:
        return f"CocoPanoptic({self.file}, {len(self)} images)"


@register_reader("semantic_maps")
class SemanticMaps:
    """Gray label maps, one class per value, 255 unlabelled; every class present is one mask.

    `annotations` is a text file with lines ``image label_map``, relative to `images` and `masks`.

    Raises:
        ValueError: a line without two names.
        FileNotFoundError: a listed image is missing.
    """

    def __init__(self, config: SourceConfig):
        self.file = config.annotations
        self._folder = _image_folder(config)
        self._masks = Path(config.masks) if config.masks else Path(self.file).with_suffix("")
        self._names = []
        for number, line in enumerate(read_text(self.file).splitlines(), start=1):
            names = line.split()
            if names and len(names) != 2:
                raise ValueError(f"{self.file}, line {number}: expected 'image label_map', got {line!r}")
            if names:
                self._names.append(names)
        self.sizes = np.array(
            [image_io.image_size(self._folder / image) for image, _ in self._names], np.int32
        ).reshape(-1, 2)
        self.num_entities = np.full(len(self._names), -1, np.int32)
        self.categories = tuple(str(value) for value in range(255))

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> SemanticRecord:
        image, mask = self._names[index]
        height, width = (int(side) for side in self.sizes[index])
        return SemanticRecord(self._folder / image, image, image, height, width, self._masks / mask)

    def __repr__(self) -> str:
        return f"SemanticMaps({self.file}, {len(self)} images)"


def read_text(file: str) -> str:
    """Content of an annotation file. Raises FileNotFoundError, or ValueError for an empty name."""
    if not file:
        raise ValueError("SourceConfig.annotations is empty; give the path of the annotation file")
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"annotation file not found: {file}")
    return path.read_text()


def read_json(file: str) -> dict[str, Any]:
    """A COCO-like dictionary. Raises ValueError when the file holds something else."""
    try:
        content = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, expected a COCO dictionary")
    return content


def list_of(content: Mapping[str, Any], key: str, file: str) -> list[dict[str, Any]]:
    """A list of the dictionary. Raises ValueError when there is none."""
    if not isinstance(content.get(key), list):
        raise ValueError(f"{file} has no list {key!r}; it has {', '.join(sorted(content)) or 'nothing'}")
    return content[key]


def _image_folder(config: SourceConfig) -> Path:
    folder = Path(config.images) if config.images else Path(config.annotations).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"image folder not found: {folder} (for annotations {config.annotations})")
    return folder


def _images_by_id(content: Mapping[str, Any], file: str) -> dict[Any, dict[str, Any]]:
    images: dict[Any, dict[str, Any]] = {}
    for image in list_of(content, "images", file):
        missing = {"id", "file_name", "height", "width"} - set(image)
        if missing:
            raise ValueError(f"{file}: image {image.get('id', image.get('file_name'))} has no {sorted(missing)[0]!r}")
        if image["id"] in images:
            raise ValueError(f"{file}: image id {image['id']} is used twice")
        images[image["id"]] = {key: image[key] for key in ("id", "file_name", "height", "width")}
    return images


def _categories(content: Mapping[str, Any], file: str) -> tuple[tuple[str, ...], dict[Any, int]]:
    """Names, and the contiguous label of every category id: the rank of the id, as in the reference registrations."""
    categories = sorted(list_of(content, "categories", file), key=lambda category: category["id"])
    names = tuple(str(category.get("name", category["id"])) for category in categories)
    return names, {category["id"]: label for label, category in enumerate(categories)}


def _size(image: Mapping[str, Any]) -> tuple[int, int]:
    return image["height"], image["width"]
