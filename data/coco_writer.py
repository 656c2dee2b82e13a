"""Generated pictures on disk as a COCO data set that the ordinary reader opens, made in resumable parts.

The folder holds `annotations.json` and `images/*.jpg`; while it is being made also `parts/`, one JSON per picture.
"""

import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from esg_jax.masks import rle
from esg_jax.masks.write import coco_records


@dataclasses.dataclass(frozen=True)
class Picture:
    """What a generator makes.

    image: RGB 0..255. labels: 1..count mark the entities, 0 is unlabelled. quality: of the JPEG.
    fields: further fields of the image in the JSON.
    """

    image: UInt8[np.ndarray, "height width 3"]
    labels: Int[np.ndarray, "height width"]
    count: int
    quality: int
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def write_pictures(
    out: str | Path,
    count: int,
    make: Callable[[int], Picture],
    *,
    info: Mapping[str, Any],
    defaults: Mapping[str, Any],
    kind: str,
    workers: int = 1,
    tables: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]] = lambda images: {},
) -> Path:
    """Makes `count` pictures in `out`, unless they are there; gives the path of `annotations.json`.

    Picture i must depend on i and `info` alone. An interrupted run continues where it stopped, and a finished folder
    can be extended.

    Args:
        make: gives picture i; called in other processes, so it must be picklable.
        info: what the folder is recognised by, kept under ``info``; its ``config`` holds the fields of a dataclass.
        defaults: of ``info["config"]``: files of before a field existed have its default.
        kind: plural noun for messages.
        workers: processes; 1 makes everything in this one.
        tables: further lists of the JSON, such as ``licenses``, given the image entries.

    Raises:
        ValueError: `out` holds pictures of another seed or configuration.
    """
    out = Path(out)
    file = out / "annotations.json"
    info, defaults = json.loads(json.dumps((info, defaults)))  # as read back, tuples as lists
    marker = out / "parts" / "info.json"
    if file.exists() or marker.exists():
        found = json.loads((file if file.exists() else marker).read_text())
        written = {**found["info"], "config": {**defaults, **found["info"]["config"]}}
        if written != info:
            raise ValueError(f"{out} holds {kind} of another seed or configuration: {found['info']}; remove {out}")
        if len(found.get("images", ())) >= count:
            return file
    (out / "images").mkdir(parents=True, exist_ok=True)
    (out / "parts").mkdir(exist_ok=True)
    _write(marker, {"info": info})
    if file.exists():
        _split(found, out)
    missing = [index for index in range(count) if not _part(out, index).exists()]
    for _ in _progress(_make_all(missing, out, make, workers), len(missing), f"rendering {kind}"):
        pass
    parts = [json.loads(_part(out, index).read_text()) for index in range(count)]
    images = [part["image"] for part in parts]
    content = {
        "info": info,
        **tables(images),
        "images": images,
        "annotations": [annotation for part in parts for annotation in part["annotations"]],
        "categories": [{"id": 1, "name": "entity", "supercategory": "entity"}],
    }
    for number, annotation in enumerate(content["annotations"], start=1):
        annotation["id"] = number
    _write(file, content)
    for path in (out / "parts").iterdir():
        path.unlink()
    (out / "parts").rmdir()
    return file


def coco_annotations(labels: Int[np.ndarray, "height width"], count: int, image_id: int) -> list[dict[str, Any]]:
    """COCO annotations, without ids, of the entities 1..count of a label map."""
    return [
        {"image_id": image_id, "category_id": 1, "iscrowd": 0, **record}
        for record in coco_records(rle.encode_labels(labels, count))
    ]


def _make_all(indices: Iterable[int], out: Path, make: Callable[[int], Picture], workers: int) -> Iterator[None]:
    run = functools.partial(_make_one, out=out, make=make)
    if workers <= 1:
        yield from map(run, indices)
        return
    # Spawned, not forked: the caller may run JAX threads.
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(run, indices, chunksize=4)


def _make_one(index: int, out: Path, make: Callable[[int], Picture]) -> None:
    picture = make(index)
    name = f"images/{index:06d}.jpg"
    Image.fromarray(picture.image).save(out / name, quality=picture.quality)
    height, width = picture.labels.shape
    image = {"id": index + 1, "file_name": name, "height": height, "width": width, **picture.fields}
    annotations = coco_annotations(picture.labels, picture.count, index + 1)
    _write(_part(out, index), {"image": image, "annotations": annotations})


def _split(content: dict[str, Any], out: Path) -> None:
    """The parts that a finished, shorter data set was joined from."""
    by_image: dict[int, list] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    for image in content["images"]:
        _write(_part(out, image["id"] - 1), {"image": image, "annotations": by_image[image["id"]]})


def _part(out: Path, index: int) -> Path:
    return out / "parts" / f"{index:06d}.json"


def _write(file: Path, content: dict[str, Any]) -> None:
    """Writes beside the file and renames, so that no half-written file is ever taken for a whole one."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(content))
    os.replace(temporary, file)


def _progress(steps: Iterator[None], total: int, text: str) -> Iterator[None]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    attached = sys.stdout.isatty()
    with Progress(*columns, disable=not attached) as progress:
        task = progress.add_task(text, total=total)
        for number, step in enumerate(steps, start=1):
            progress.advance(task)
            if not attached and (number % max(total // 10, 1) == 0 or number == total):
                print(f"{text}: {number} of {total}", flush=True)
            yield step
