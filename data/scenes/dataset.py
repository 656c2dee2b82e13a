"""Scenes on disk as a COCO data set that the ordinary reader opens: `annotations.json` beside a folder of JPEGs."""

import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.scenes import SceneConfig, render_scene
from esg_jax.masks import rle
from esg_jax.masks.write import coco_records

# Part of what a finished folder is recognised by; raise it when equal seeds give other pixels.
VERSION = 2
LICENCE = "CC0-1.0; rendered from photographs without copyright restrictions (data/scenes/README.md)"


def write_scenes(
    out: str | Path, count: int, seed: int = 0, config: SceneConfig | None = None, workers: int = 1
) -> Path:
    """Renders `count` scenes into `out`, unless they are there; gives the path of `annotations.json`.

    Scene i depends on (seed, i) alone. An interrupted run continues where it stopped.

    Args:
        workers: processes; 1 renders in this one.

    Raises:
        ValueError: `out` holds scenes of another seed or configuration.
    """
    config = config or SceneConfig()
    out = Path(out)
    file = out / "annotations.json"
    info = {"description": "procedural scenes", "version": VERSION, "seed": seed, "config": dataclasses.asdict(config)}
    info, defaults = json.loads(json.dumps((info, dataclasses.asdict(SceneConfig()))))  # as read back, tuples as lists
    if file.exists():
        content = json.loads(file.read_text())
        # Files of before a field existed have its default.
        written = {**content["info"], "config": {**defaults, **content["info"]["config"]}}
        if written != info:
            raise ValueError(f"{file} holds scenes of another seed or configuration: {content['info']}; remove {out}")
        if len(content["images"]) >= count:
            return file
    (out / "images").mkdir(parents=True, exist_ok=True)
    (out / "parts").mkdir(exist_ok=True)
    if file.exists():
        _split(json.loads(file.read_text()), out)
    missing = [index for index in range(count) if not _part(out, index).exists()]
    for _ in _progress(_render_all(missing, out, seed, config, workers), len(missing), "rendering scenes"):
        pass
    parts = [json.loads(_part(out, index).read_text()) for index in range(count)]
    content = {
        "info": info,
        "licenses": [{"id": 1, "name": LICENCE, "url": "https://creativecommons.org/publicdomain/zero/1.0/"}],
        "images": [part["image"] for part in parts],
        "annotations": [annotation for part in parts for annotation in part["annotations"]],
        "categories": [{"id": 1, "name": "entity", "supercategory": "entity"}],
    }
    for number, annotation in enumerate(content["annotations"], start=1):
        annotation["id"] = number
    _write(file, content)
    for index in range(count):
        _part(out, index).unlink()
    (out / "parts").rmdir()
    return file


def _render_all(indices: list[int], out: Path, seed: int, config: SceneConfig, workers: int) -> Iterator[None]:
    render = functools.partial(_render_one, out=out, seed=seed, config=config)
    if workers <= 1:
        yield from map(render, indices)
        return
    # Spawned, not forked: the caller may run JAX threads.
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(render, indices, chunksize=4)


def _render_one(index: int, out: Path, seed: int, config: SceneConfig) -> None:
    scene = render_scene((seed, index), config)
    name = f"images/{index:06d}.jpg"
    quality = int(np.random.default_rng((seed, index)).integers(82, 96))
    Image.fromarray(scene.image).save(out / name, quality=quality)
    height, width = scene.labels.shape
    annotations = [
        {"image_id": index + 1, "category_id": 1, "iscrowd": 0, **record}
        for record in coco_records(rle.encode_labels(scene.labels, scene.count))
    ]
    image = {"id": index + 1, "file_name": name, "height": height, "width": width, "license": 1, "style": scene.style}
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
