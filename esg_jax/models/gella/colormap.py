"""Colormaps: entity masks as one picture in which every entity has its own colour (ESG, section 4.3).

The host ships an integer label map; colours are a table lookup on the device, so drawing new ones costs nothing.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

ASSIGNMENTS = ("random", "location", "index")

# Colour lattice of 7 x 7 x 7 levels; its first point, black, is what no entity has.
_LEVELS, _SPACING = 7, 42
# Cells of the padded square that mass centres fall into, rows x columns.
_GRID = (16, 20)


@dataclasses.dataclass(frozen=True)
class ColormapConfig:
    """How entities are coloured.

    Attributes:
        size: side of the square label map in pixels, a multiple of 32; it bounds the detail of masks.
        assignment: "random" colours (the paper's default, new ones at every draw), "location" (by mass centre on a
            grid of 16 x 20 cells, the paper's ablation) or "index" (a fixed palette by number).
        jitter: random colours move by up to this many levels per channel; at most 12 keeps them 18 apart.
    """

    size: int = 1024
    assignment: str = "random"
    jitter: int = 12

    def __post_init__(self):
        if self.size % 32 or self.size < 32:
            raise ValueError(f"colormap.size is {self.size}; it must be a positive multiple of 32")
        if self.assignment not in ASSIGNMENTS:
            raise ValueError(f"colormap.assignment is {self.assignment!r}; choose one of {', '.join(ASSIGNMENTS)}")
        if not 0 <= self.jitter <= 12:
            raise ValueError(f"colormap.jitter is {self.jitter}; between 0 and 12 levels colours stay distinct")


def colorize(
    label_map_bhw: Int[Array, "b h w"], keys_b: Array, max_entities: int, config: ColormapConfig
) -> Float[Array, "b h w 3"]:
    """Colours label maps, RGB on the 0..255 scale.

    Args:
        label_map_bhw: 0 where there is no entity (black), 1..max_entities elsewhere.
        keys_b: a typed PRNG key per map; only "random" uses it.
        max_entities: static bound of the labels.
        config: the assignment of colours.
    """
    if config.assignment == "random":
        table = jax.vmap(lambda key: random_colors(key, max_entities, config.jitter))(keys_b)
    elif config.assignment == "location":
        table = jax.vmap(lambda labels: location_colors(labels, max_entities))(label_map_bhw)
    else:
        palette = jnp.asarray(_palette(max_entities), jnp.float32)
        table = jnp.broadcast_to(palette, (len(label_map_bhw), *palette.shape))
    return jax.vmap(lambda colors, labels: colors[labels])(table, label_map_bhw)


def random_colors(key: Array, count: int, jitter: int = 12) -> Float[Array, "n1 3"]:
    """`count` distinct random colours after black, any two at least `spacing - 2 * jitter` levels apart.

    The lattice holds 342 colours; a finer one is used when there are more entities.
    """
    lattice, spacing = _lattice(count)
    choice, moves = jax.random.split(key)
    order = jax.random.permutation(choice, len(lattice))[:count]
    jitter = min(jitter, (spacing - 1) // 2)
    offsets = jax.random.randint(moves, (count, 3), -jitter, jitter + 1)
    colors = jnp.clip(jnp.asarray(lattice)[order] + offsets, 0, 255)
    return jnp.concatenate([jnp.zeros((1, 3)), colors.astype(jnp.float32)])


def location_colors(label_map_hw: Int[Array, "h w"], count: int) -> Float[Array, "n1 3"]:
    """Colours by mass centre: each cell of the grid has its own; taken cells send an entity to the nearest free one.

    Larger entities choose first. With more entities than cells the smallest share the last cell chosen.
    """
    height, width = label_map_hw.shape
    rows, columns = _GRID
    flat = label_map_hw.reshape(-1)
    y, x = (axis.reshape(-1) for axis in jnp.mgrid[0:height, 0:width])
    area, sum_y, sum_x = (jnp.zeros(count + 1).at[flat].add(weight) for weight in (jnp.ones_like(y), y + 0.5, x + 0.5))
    centre = jnp.stack([sum_y / height * rows, sum_x / width * columns], -1) / jnp.maximum(area, 1)[:, None]
    cells = jnp.stack(jnp.meshgrid(jnp.arange(rows), jnp.arange(columns), indexing="ij"), -1).reshape(-1, 2) + 0.5

    def choose(taken: Bool[Array, "cells"], entity):
        own = jnp.floor(centre[entity]) + 0.5
        distance = jnp.where(taken, jnp.inf, jnp.sum((cells - own) ** 2, axis=-1))
        cell = jnp.argmin(distance)
        return jnp.where(area[entity] > 0, taken.at[cell].set(True), taken), cell

    by_area = jnp.argsort(-area[1:], stable=True) + 1
    _, chosen = jax.lax.scan(choose, jnp.zeros(rows * columns, bool), by_area)
    palette = jnp.asarray(_palette(rows * columns)[1:], jnp.float32)
    return jnp.zeros((count + 1, 3)).at[by_area].set(palette[chosen])


def _lattice(count: int) -> tuple[np.ndarray, int]:
    """All lattice colours but black, and the distance of neighbours."""
    levels, spacing = _LEVELS, _SPACING
    while levels**3 - 1 < count:
        levels += 1
        spacing = 255 // (levels - 1)
    if spacing < 1:
        raise ValueError(f"{count} entities are more than there are colours")
    axis = np.arange(levels) * spacing
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)[1:], spacing


def _palette(count: int) -> np.ndarray:
    """Black and `count` fixed lattice colours, spread so that neighbours in the list differ."""
    lattice, _ = _lattice(count)
    return np.concatenate([np.zeros((1, 3), int), lattice[np.random.default_rng(0).permutation(len(lattice))[:count]]])


def pack_labels(label_map_bhw: Int[Array, "b h w"], max_entities: int) -> tuple[Array, Bool[Array, "b n"]]:
    """The masks that are painted in label maps: targets of the reconstruction.

    Args:
        label_map_bhw: 0..max_entities; width a multiple of 8.
        max_entities: N.

    Returns:
        masks: uint8 (B, N, H, W/8), packed big-endian along W as `numpy.packbits` does.
        present: which labels occur.
    """
    batch, height, width = label_map_bhw.shape
    labels = jnp.arange(1, max_entities + 1, dtype=label_map_bhw.dtype)[:, None, None]
    octets = label_map_bhw.reshape(batch, 1, height, width // 8, 8)
    packed = sum((octets[..., bit] == labels).astype(jnp.uint8) << (7 - bit) for bit in range(8))
    return packed, jnp.any(packed != 0, axis=(2, 3))
