"""Procedural scenes: dense, exactly partitioned pictures composed from photographs and textures."""

import dataclasses

import numpy as np
from jaxtyping import Int, UInt8

from data.scenes.layout import Layout, make_layout
from data.scenes.render import render


@dataclasses.dataclass(frozen=True)
class SceneConfig:
    """What scenes are like.

    long_side: pixels, uniform in the range.
    aspects: long over short side, one is drawn.
    entities: about log-uniform in the range, before those too small are dropped.
    min_area: fraction of the picture that an entity must show.
    portrait: share of upright pictures.
    """

    long_side: tuple[int, int] = (1500, 2500)
    aspects: tuple[float, ...] = (1.0, 1.25, 4 / 3, 4 / 3, 1.5, 1.5, 16 / 9)
    entities: tuple[int, int] = (5, 40)
    min_area: float = 0.00025
    portrait: float = 0.3

    def __post_init__(self):
        for name in ("long_side", "entities"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(f"{name} is {low} {high}; it must be a range MIN MAX with 1 <= MIN <= MAX")
        if not 0 <= self.min_area < 1:
            raise ValueError(f"min_area is {self.min_area}; it is a fraction of the picture, from 0 to below 1")
        if not 0 <= self.portrait <= 1:
            raise ValueError(f"portrait is {self.portrait}; it is a share of the scenes, from 0 to 1")


@dataclasses.dataclass(frozen=True)
class Scene:
    """image: RGB 0..255. labels: 1..count, every pixel belongs to one entity."""

    image: UInt8[np.ndarray, "height width 3"]
    labels: Int[np.ndarray, "height width"]
    count: int
    style: str


def scene_layout(seed: int | tuple[int, ...], config: SceneConfig | None = None) -> tuple[np.random.Generator, Layout]:
    """What is where in the scene of a seed, and the generator that its painting goes on with."""
    config = config or SceneConfig()
    rng = np.random.default_rng(seed)
    long_side = int(rng.integers(config.long_side[0], config.long_side[1] + 1))
    short_side = int(long_side / rng.choice(config.aspects))
    width, height = (short_side, long_side) if rng.random() < config.portrait else (long_side, short_side)
    return rng, make_layout(rng, width, height, config.entities, config.min_area)


def render_scene(seed: int | tuple[int, ...], config: SceneConfig | None = None) -> Scene:
    """The scene of a seed; equal seeds give equal pixels (with equal versions of numpy, PIL and scikit-image)."""
    rng, layout = scene_layout(seed, config)
    return Scene(render(rng, layout), layout.labels, len(layout.items), layout.style)
