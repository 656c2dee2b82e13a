"""Entities of label maps as regions of a feature map: coverage of its cells, bounding boxes, RoI-Align."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from esg_jax.ops.padding import nearest_index
from esg_jax.ops.point_sample import point_sample_features


def mask_weights(
    label_map_bhw: Int[Array, "b h w"], max_entities: int, grid: tuple[int, int]
) -> tuple[Float[Array, "b n s"], Int[Array, "b n"]]:
    """The share of every grid cell that every entity covers, and the entities' areas in pixels.

    A pixel belongs to the cell in which its centre lies; the grid may be of any size up to that of the label map.
    """
    rows, columns = (nearest_index(cells, side) for side, cells in zip(label_map_bhw.shape[1:], grid, strict=True))
    cell = rows[:, None] * grid[1] + columns
    size = np.bincount(cell.ravel(), minlength=grid[0] * grid[1]).astype(np.float32)

    def count(labels_hw):
        return jnp.zeros((max_entities + 1, len(size)), jnp.int32).at[labels_hw, cell].add(1)[1:]

    counts = jax.vmap(count)(label_map_bhw)
    return counts / np.maximum(size, 1), jnp.sum(counts, axis=-1)


def bounding_boxes(label_map_bhw: Int[Array, "b h w"], max_entities: int) -> Float[Array, "b n 4"]:
    """(left, top, right, bottom) of every entity in fractions of the map; all zero for an entity that is not there."""
    height, width = label_map_bhw.shape[1:]
    y, x = jnp.mgrid[0:height, 0:width]

    def boxes(labels_hw):
        def edges(place, side):
            first = jnp.full(max_entities + 1, side, jnp.int32).at[labels_hw].min(place)
            last = jnp.zeros(max_entities + 1, jnp.int32).at[labels_hw].max(place + 1)
            return first[1:] / side, last[1:] / side

        (left, right), (top, bottom) = edges(x, width), edges(y, height)
        return jnp.where(right[:, None] > 0, jnp.stack([left, top, right, bottom], axis=-1), 0.0)

    return jax.vmap(boxes)(label_map_bhw)


def roi_align(
    maps_bhwc: Float[Array, "b h w c"], boxes_bn4: Float[Array, "b n 4"], bins: int, samples: int
) -> Float[Array, "b n k k c"]:
    """RoI-Align (He et al. 2017): the mean of `samples`^2 bilinear samples in each of `bins`^2 bins of every box.

    Args:
        maps_bhwc: features.
        boxes_bn4: (left, top, right, bottom) in fractions of the map.
        bins, samples: per axis.
    """
    batch, height, width, channels = maps_bhwc.shape
    count, per_axis = boxes_bn4.shape[1], bins * samples
    place = (np.arange(per_axis, dtype=np.float32) + 0.5) / per_axis
    low, high = boxes_bn4[..., :2, None], boxes_bn4[..., 2:, None]
    at = low + (high - low) * place  # b n 2 p
    # Beyond the outermost pixel centres the map goes on with its edge.
    edge = 0.5 / np.array([width, height], np.float32)[:, None]
    x, y = jnp.moveaxis(jnp.clip(at, edge, 1 - edge), 2, 0)
    shape = (batch, count, per_axis, per_axis)
    points = jnp.stack([jnp.broadcast_to(x[:, :, None], shape), jnp.broadcast_to(y[..., None], shape)], axis=-1)
    values = point_sample_features(maps_bhwc, points.reshape(batch, -1, 2))
    return values.reshape(batch, count, bins, samples, bins, samples, channels).mean((3, 5))


def nearest_labels(label_map_bhw: Int[Array, "b h w"], side: int) -> Int[Array, "b s s"]:
    """Label maps at another size, nearest neighbour with half-pixel centres."""
    rows, columns = (nearest_index(old, side) for old in label_map_bhw.shape[1:])
    return label_map_bhw[:, rows[:, None], columns]
