"""Scenes on disk as a COCO data set, see `data.coco_writer`."""

import dataclasses
import functools
from pathlib import Path

import numpy as np

from data.coco_writer import Picture, write_pictures
from data.scenes import SceneConfig, render_scene

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
    info = {"description": "procedural scenes", "version": VERSION, "seed": seed, "config": dataclasses.asdict(config)}
    return write_pictures(
        out,
        count,
        functools.partial(_picture, seed=seed, config=config),
        info=info,
        defaults=dataclasses.asdict(SceneConfig()),
        kind="scenes",
        workers=workers,
        tables=lambda images: {
            "licenses": [{"id": 1, "name": LICENCE, "url": "https://creativecommons.org/publicdomain/zero/1.0/"}]
        },
    )


def _picture(index: int, seed: int, config: SceneConfig) -> Picture:
    scene = render_scene((seed, index), config)
    quality = int(np.random.default_rng((seed, index)).integers(82, 96))
    return Picture(scene.image, scene.labels, scene.count, quality, {"license": 1, "style": scene.style})
