"""Entity masks from wherever they come: label maps, run-length encodings, folders of binary pictures, arrays."""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from esg_jax.masks import rle
from esg_jax.masks.layers import label_layers
from esg_jax.masks.mask_set import MaskSet
from esg_jax.masks.rle import MaskError

FORMATS = "a PNG label map, a JSON list of COCO RLEs, a COCO file, a .npy or .npz array, or a folder of binary PNGs"
_SUFFIXES = (".png", ".json", ".npz", ".npy", "")


def read_masks(
    source: str | Path | np.ndarray | Sequence[Mapping[str, Any]], size: tuple[int, int], image_name: str = ""
) -> MaskSet:
    """Masks of one image.

    Args:
        source: one of
            - a PNG with one channel (0 nothing, every other value one mask) or in the RGB code of COCO panoptic;
            - a JSON list of RLEs, or of records with `segmentation` (RLE or polygons) and perhaps `id` and `score` or
              `predicted_iou`; such a list itself;
            - a COCO JSON with `images` and `annotations`, from which those of `image_name` are taken;
            - a folder of binary PNGs of the image's size, in name order; non-zero is inside;
            - an array, or .npy / .npz (`masks`, perhaps `scores`): (h, w) integer label map, (n, h, w) boolean or
              0/1 integer masks, or (n, h, w) probabilities.
        size: (height, width) of the image in pixels.
        image_name: file name of the image; only for COCO files.

    Raises:
        FileNotFoundError: no such file.
        MaskError: unreadable, of another size, or of unknown form; names file and mask.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, size, "the array of masks")
    if not isinstance(source, str | Path):
        return _from_records(source, size, "the list of masks")
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"masks not found: {path}")
    if path.is_dir():
        return _from_folder(path, size)
    if path.suffix == ".json":
        return _from_json(path, size, image_name)
    if path.suffix in (".npy", ".npz"):
        return _from_numpy(path, size)
    return _from_array(_label_image(path), size, str(path))


def _label_image(path: Path) -> np.ndarray:
    """Gray values, palette indices, or ids in COCO's RGB code."""
    try:
        with Image.open(path) as image:
            values = np.asarray(image)
    except Exception as error:
        raise MaskError(f"cannot read masks {path}: {error}; expected {FORMATS}") from error
    if values.ndim == 2:
        return values
    if values.shape[-1] == 3:
        return ids_from_rgb(values)
    raise MaskError(f"label map {path} has {values.shape[-1]} channels, expected one, or three in COCO's id code")


def ids_from_rgb(rgb_hw3: UInt8[np.ndarray, "h w 3"]) -> Int64[np.ndarray, "h w"]:
    """Segment ids of a PNG in COCO panoptic's code, R + 256 G + 65536 B."""
    red, green, blue = np.moveaxis(rgb_hw3.astype(np.int64), -1, 0)
    return red + (green << 8) + (blue << 16)


def mask_file_of(path: str | Path, stem: str) -> Path:
    """The file that holds the masks of one of many images: a COCO JSON itself; in a folder, what is named like it.

    Args:
        path: COCO file or folder.
        stem: name of the image without its suffix.

    Raises:
        FileNotFoundError: no such path, or nothing in the folder has the image's name.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"masks not found: {path}")
    if not path.is_dir():
        return path
    found = next((file for suffix in _SUFFIXES if (file := path / f"{stem}{suffix}").exists()), None)
    if found is None:
        raise FileNotFoundError(f"{path} has no {stem}.png, .json, .npz, .npy or folder {stem}")
    return found


def _from_json(path: Path, size: tuple[int, int], image_name: str) -> MaskSet:
    content = _read_json(path, path.stat().st_mtime_ns)
    if isinstance(content, _CocoFile):
        count = content.names.count(image_name)
        if count != 1:
            raise MaskError(f"{path} lists {count} images named {image_name!r}, expected one")
        content = content.masks[content.names.index(image_name)]
    return _from_records(content, size, str(path))


@dataclasses.dataclass(frozen=True)
class _CocoFile:
    """Names of the images, and the masks of each."""

    names: list[str]
    masks: list[list[Any]]


@functools.lru_cache(maxsize=2)
def _read_json(path: Path, mtime_ns: int) -> Any:
    """The content, by image when it is a COCO file: such a file is asked once for every image."""
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise MaskError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, Mapping):
        return content
    images, annotations = content.get("images"), content.get("annotations")
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise MaskError(f"{path} is a dictionary without 'images' and 'annotations'; expected {FORMATS}")
    grouped: dict[Any, list[Any]] = {image["id"]: [] for image in images}
    for entry in annotations:
        if not entry.get("iscrowd"):
            grouped.setdefault(entry.get("image_id"), []).append(entry)
    return _CocoFile(
        [Path(str(image.get("file_name"))).name for image in images], [grouped[image["id"]] for image in images]
    )


def _from_records(records: Any, size: tuple[int, int], name: str) -> MaskSet:
    if not isinstance(records, Sequence) or isinstance(records, str):
        raise MaskError(f"{name} holds a {type(records).__name__}, expected a list of RLEs")
    counts, ids, scores = [], [], []
    for number, record in enumerate(records):
        if not isinstance(record, Mapping):
            raise MaskError(f"{name}: mask {number} is a {type(record).__name__}, expected an RLE or a COCO record")
        counts.append(rle.runs_of(record.get("segmentation", record), size, f"{name}: mask {number}"))
        ids.append(record.get("id", number + 1))
        scores.append(record.get("score", record.get("predicted_iou", math.nan)))
    known = np.array(scores, np.float32)
    return MaskSet(_layers(counts, size), tuple(ids), None if np.isnan(known).any() or not ids else known)


def _layers(counts: list[np.ndarray], size: tuple[int, int]) -> list[np.ndarray]:
    return label_layers(counts, *size) if counts else [np.zeros(size, np.uint8)]


def _from_folder(path: Path, size: tuple[int, int]) -> MaskSet:
    files = sorted(path.glob("*.png"))
    if not files:
        raise FileNotFoundError(f"no PNG in folder of masks {path}")
    counts = []
    for file in files:
        values = _label_image(file)
        _check_size(values.shape, size, str(file))
        counts.append(rle.runs_of_mask(values != 0))
    return MaskSet(_layers(counts, size), tuple(file.stem for file in files))


def _from_numpy(path: Path, size: tuple[int, int]) -> MaskSet:
    try:
        content = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise MaskError(f"cannot read masks {path}: {error}") from error
    if isinstance(content, np.ndarray):
        return _from_array(content, size, str(path))
    if "label_map" in content:  # `esg predict --formats npz` wrote -1 for nothing once
        array = content["label_map"].astype(np.int64) + 1
    elif "masks" in content:
        array = content["masks"]
    else:
        raise MaskError(f"{path} has no array 'masks'; it has {', '.join(content) or 'nothing'}")
    masks = _from_array(array, size, str(path))
    if "scores" not in content:
        return masks
    scores = np.asarray(content["scores"], np.float32)
    if array.ndim == 2:  # a label map may lack labels: masks that others cover
        scores = scores[[label - 1 for label in masks.ids if label <= len(scores)]]
    if scores.shape != (len(masks),):
        raise MaskError(f"{path}: scores of shape {scores.shape} for {len(masks)} masks")
    return dataclasses.replace(masks, scores=scores)


def _from_array(array: np.ndarray, size: tuple[int, int], name: str) -> MaskSet:
    if array.ndim not in (2, 3):
        raise MaskError(f"{name} has shape {array.shape}; expected (height, width) or (masks, height, width)")
    _check_size(array.shape[-2:], size, name)
    if array.ndim == 2:
        if not np.issubdtype(array.dtype, np.integer):
            raise MaskError(f"{name} is a label map of {array.dtype}; expected integers")
        if array.size and array.min() < 0:
            raise MaskError(f"{name} is a label map with the value {array.min()}; expected 0 for nothing and up")
        values, inverse = np.unique(array, return_inverse=True)
        ranks = np.cumsum(values != 0) * (values != 0)
        return MaskSet([ranks.astype(np.int32)[inverse.reshape(array.shape)]], tuple(values[values != 0].tolist()))
    probabilities = None
    if np.issubdtype(array.dtype, np.floating):
        if array.size and not (array.min() >= 0 and array.max() <= 1):
            raise MaskError(f"{name} has values outside of 0..1; expected probabilities (apply a sigmoid to logits)")
        probabilities = array.astype(np.float32)
        array = array > 0.5
    elif array.size and array.max() > 1 or array.size and array.min() < 0:
        raise MaskError(f"{name} of {array.dtype} has values other than 0 and 1; expected binary masks")
    layers = _layers([rle.runs_of_mask(mask) for mask in array], size)
    return MaskSet(layers, tuple(range(1, len(array) + 1)), None, probabilities)


def _check_size(shape: tuple[int, ...], size: tuple[int, int], name: str) -> None:
    if tuple(shape) != tuple(size):
        raise MaskError(f"{name} is {shape[0]}x{shape[1]} pixels, its image is {size[0]}x{size[1]} (height x width)")
