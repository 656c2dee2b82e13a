"""The original image in tiles, and the piece of the network's maps that a tile needs."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from esg_jax.inference.entities.geometry import AxisTable, axis_table, tile_starts

TILE = 128
_SMALLEST_PATCH = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TileAxis:
    """One axis of all images of a batch, cut into tiles. Arrays start with (batch, view); see `AxisTable`.

    Attributes:
        start: first cell of the patch of each tile.
        index, weight, cover: the stacked `AxisTable`s.
    """

    start: Int[Array, "*b t n"]
    index: Int[Array, "*b t s 4"]
    weight: Float[Array, "*b t s 4"]
    cover: Float[Array, "*b t s"]

    def matrix(self, tile: Int[Array, ""], patch: int):
        """Start of the patch (t,), interpolation matrices (t, TILE, patch) and coverage (t, TILE) of one tile."""
        start = jax.lax.dynamic_index_in_dim(self.start, tile, axis=1, keepdims=False)
        index, weight, cover = (
            jax.lax.dynamic_slice_in_dim(table, tile * TILE, TILE, axis=1)
            for table in (self.index, self.weight, self.cover)
        )
        hit = (index - start[:, None, None])[..., None] == jnp.arange(patch)
        return start, jnp.sum(jnp.where(hit, weight[..., None], 0.0), axis=2), cover


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Canvas:
    """Geometry of a batch of images, an argument of the compiled programs.

    Attributes:
        rows, columns: the two axes.
        tiles: number of tiles down and across each image.
        patch_yx: static size of the patches.
    """

    rows: TileAxis
    columns: TileAxis
    tiles: Int[Array, "*b 2"]
    patch_yx: tuple[int, int] = dataclasses.field(metadata=dict(static=True))

    @property
    def length(self) -> int:
        """Side of the square that holds every image of the batch."""
        return self.rows.cover.shape[-1]

    def tile(self, values_thqw: Float[Array, "t h q w"], index: Int[Array, ""]) -> "Tile":
        """Everything about tile `index` (row-major) of one image; the canvas must have no batch axis."""
        y, x = index // self.tiles[1], index % self.tiles[1]
        start_y, matrix_ty, cover_y = self.rows.matrix(y, self.patch_yx[0])
        start_x, matrix_tx, cover_x = self.columns.matrix(x, self.patch_yx[1])
        size = (self.patch_yx[0], values_thqw.shape[2], self.patch_yx[1])
        patch = jax.vmap(lambda view, y, x: jax.lax.dynamic_slice(view, (y, 0, x), size))(values_thqw, start_y, start_x)
        cover = cover_y[:, :, None] * cover_x[:, None, :]
        return Tile(patch, matrix_ty, matrix_tx, cover, (y * TILE, x * TILE))


@dataclasses.dataclass(frozen=True)
class Tile:
    """One tile: patches of the maps, matrices that interpolate them, which views cover which pixel, its corner."""

    patch_thqw: Float[Array, "t h q w"]
    matrix_ty: Float[Array, "t y h"]
    matrix_tx: Float[Array, "t x w"]
    cover_tyx: Float[Array, "t y x"]
    corner: tuple[Array, Array]

    def interpolate(self, select: Int[Array, "k"] | None = None) -> Float[Array, "t y k x"]:
        """Values of all maps, or of those in `select`, at the pixels of the tile."""
        patch = self.patch_thqw if select is None else self.patch_thqw[:, :, select]
        rows = jnp.einsum("tyi,tiqj->tyqj", self.matrix_ty, patch, precision="highest")
        return jnp.einsum("tyqj,txj->tyqx", rows, self.matrix_tx, precision="highest")


def make_canvas(
    cells: tuple[int, int],
    padded: tuple[int, int],
    sizes_bt2: Int[np.ndarray, "b t 2"],
    boxes_bt4: Int[np.ndarray, "b t 4"],
    originals: Sequence[tuple[int, int]],
) -> Canvas:
    """Canvas of a batch.

    Lengths and patches are rounded up to powers of two, so that images of all sizes need only a few programs.

    Args:
        cells: (height, width) of the maps to interpolate.
        padded: (height, width) of the padded views.
        sizes_bt2: (height, width) of the views without padding.
        boxes_bt4: (x0, y0, x1, y1) of the views in original pixels, half open.
        originals: (height, width) of the images.

    Raises:
        ValueError: a view does not fit into the padded size or its image.
    """
    length = max(TILE, power_of_two(max(max(size) for size in originals)))
    axes = []
    for axis in (0, 1):
        tables = [
            axis_table(cells[axis], padded[axis], sizes[:, axis], boxes[:, axis ^ 1], boxes[:, 2 + (axis ^ 1)], length)
            for sizes, boxes in zip(sizes_bt2, boxes_bt4, strict=True)
        ]
        starts, needs = zip(*(tile_starts(table, TILE) for table in tables), strict=True)
        axes.append((tables, np.stack(starts), max(needs)))
    patch = max(_SMALLEST_PATCH, power_of_two(max(need for *_, need in axes)))
    patch_yx = (min(patch, cells[0]), min(patch, cells[1]))
    rows, columns = (
        _stack(tables, np.minimum(starts, cells[axis] - patch_yx[axis]))
        for axis, (tables, starts, _) in enumerate(axes)
    )
    return Canvas(rows, columns, -(-np.asarray(originals, np.int32) // TILE), patch_yx)


def _stack(tables: list[AxisTable], starts: Int[np.ndarray, "b t n"]) -> TileAxis:
    return TileAxis(starts, *(np.stack([getattr(t, name) for t in tables]) for name in ("index", "weight", "cover")))


def power_of_two(value: int) -> int:
    """The least power of two that is not below `value`."""
    return 1 << (int(value) - 1).bit_length()
