"""Geometry of the crop data loader and of large-scale jitter, in numpy and PIL.

Images are resized by PIL's antialiased bilinear filter on uint8 and masks by nearest neighbour, which is what the
published models were trained and tested with. Masks travel as label maps (value k + 1 marks entity k): nearest
sampling of a label map equals nearest sampling of every mask.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int, Integer, UInt8
from PIL import Image

CROP_RATIO = 0.7
CROP_STRIDE = 0.6


@dataclasses.dataclass(frozen=True)
class View:
    """What part of the original image a view shows and at which size.

    box: (x0, y0, x1, y1), half open, in pixels of the (flipped, when `flip`) original.
    size: (height, width) of the view in pixels.
    """

    box: tuple[int, int, int, int]
    size: tuple[int, int]
    flip: bool = False


def shortest_edge_size(height: int, width: int, short_edge: int, max_size: int) -> tuple[int, int]:
    """(height, width) with the short side at `short_edge`, unless the long side would exceed `max_size`.

    Never below one pixel, which very long images would otherwise reach.
    """
    scale = short_edge / min(height, width)
    if height < width:
        new_height, new_width = float(short_edge), scale * width
    else:
        new_height, new_width = scale * height, float(short_edge)
    longest = max(new_height, new_width)
    if longest > max_size:
        shrink = max_size / longest
        new_height, new_width = new_height * shrink, new_width * shrink
    return max(1, int(new_height + 0.5)), max(1, int(new_width + 0.5))


def corner_boxes(
    height: int, width: int, ratio: float = CROP_RATIO, stride: float = CROP_STRIDE
) -> Int[np.ndarray, "4 4"]:
    """Crops at the four corners in the order TL, TR, BL, BR as (x0, y0, x1, y1), half open (paper section 4.1).

    Products are truncated in double precision: int(0.7 * 90) is 62. A side is at least one pixel.
    """
    crop_h, crop_w = max(1, int(ratio * height)), max(1, int(ratio * width))
    y = min(int(stride * height), height - crop_h)
    x = min(int(stride * width), width - crop_w)
    starts = np.array([(0, 0), (x, 0), (0, y), (x, y)])
    return np.concatenate([starts, starts + (crop_w, crop_h)], axis=1).astype(np.int32)


def full_view(height: int, width: int, short_edge: int, max_size: int, flip: bool = False) -> View:
    """The whole image, resized by the shortest-edge rule."""
    return View((0, 0, width, height), shortest_edge_size(height, width, short_edge, max_size), flip)


def crop_view(height: int, width: int, corner: int, short_edge: int, max_size: int, flip: bool = False) -> View:
    """Corner crop `corner` (0..3) of the (flipped) original, resized by the same rule as the whole image."""
    x0, y0, x1, y1 = (int(value) for value in corner_boxes(height, width)[corner])
    return View((x0, y0, x1, y1), shortest_edge_size(y1 - y0, x1 - x0, short_edge, max_size), flip)


def resize_image(image_hw3: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "height width 3"]:
    """PIL bilinear resize (antialiased when shrinking) to (height, width)."""
    if image_hw3.shape[:2] == tuple(size):
        return image_hw3
    return np.asarray(Image.fromarray(image_hw3).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def nearest_indices(size: int, new_size: int) -> Int[np.ndarray, "new_size"]:
    """Source index of every output pixel of PIL's nearest-neighbour resize along one axis."""
    scale = size / new_size
    # PIL adds the step up one pixel at a time; cumsum repeats the same rounding.
    steps = np.full(new_size, scale)
    steps[0] = scale * 0.5
    return np.minimum(np.cumsum(steps).astype(np.int32), size - 1)


def view_image(image_hw3: UInt8[np.ndarray, "h w 3"], view: View) -> UInt8[np.ndarray, "height width 3"]:
    """Pixels of a view: crop, then resize (the crop's own border is the border of the filter), flipped if asked.

    The filter is symmetric, so flipping the few resized pixels gives what resizing the flipped original gives.
    """
    x0, y0, x1, y1 = _unflipped(view, image_hw3.shape[1])
    pixels = resize_image(np.ascontiguousarray(image_hw3[y0:y1, x0:x1]), view.size)
    return pixels[:, ::-1] if view.flip else pixels


def view_labels(labels_hw: Integer[np.ndarray, "h w"], view: View) -> Integer[np.ndarray, "height width"]:
    """Label map of a view, nearest neighbour."""
    x0, y0, x1, y1 = view.box
    rows = y0 + nearest_indices(y1 - y0, view.size[0])
    columns = x0 + nearest_indices(x1 - x0, view.size[1])
    if view.flip:
        columns = labels_hw.shape[1] - 1 - columns
    if labels_hw.flags.f_contiguous:  # decoded RLE: gather whole columns first
        return labels_hw[:, columns][rows]
    return labels_hw[rows][:, columns]


def _unflipped(view: View, width: int) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = view.box
    return (width - x1, y0, width - x0, y1) if view.flip else (x0, y0, x1, y1)


def packed_masks(
    layers: list[Integer[np.ndarray, "height width"]], entities: Integer[np.ndarray, "n"], padded: tuple[int, int]
) -> tuple[UInt8[np.ndarray, "n padded_height packed_width"], Bool[np.ndarray, "n"]]:
    """Bit-packed masks of the chosen entities, zero padded at bottom and right, and which of them are visible.

    Args:
        layers: label maps of one view; value k + 1 marks entity k.
        entities: which k to extract, in output order.
        padded: (height, width) to pad to; width a multiple of 8.
    """
    packed = np.zeros((len(entities), padded[0], padded[1] // 8), np.uint8)
    visible = np.zeros(len(entities), bool)
    for labels in layers:
        height, width = labels.shape
        labels = np.ascontiguousarray(labels)
        counts = np.bincount(labels.ravel(), minlength=int(entities.max(initial=0)) + 2)
        for slot in np.flatnonzero(counts[entities + 1]):
            bits = np.packbits(labels == entities[slot] + 1, axis=-1)
            packed[slot, :height, : bits.shape[1]] = bits
            visible[slot] = True
    return packed, visible


def pad_image(
    image_hw3: UInt8[np.ndarray, "h w 3"], padded: tuple[int, int], value: int = 0
) -> UInt8[np.ndarray, "height width 3"]:
    """Pads at the bottom and the right."""
    out = np.full((*padded, 3), value, np.uint8)
    out[: image_hw3.shape[0], : image_hw3.shape[1]] = image_hw3
    return out


def round_up(size: tuple[int, int], multiple: int = 32) -> tuple[int, int]:
    """Both sides up to the next multiple."""
    return -(-size[0] // multiple) * multiple, -(-size[1] // multiple) * multiple


def inference_views(
    image_hw3: UInt8[np.ndarray, "h w 3"],
    *,
    num_views: int = 5,
    short_edge: int = 800,
    max_size: int = 1333,
    padded: tuple[int, int] | None = None,
) -> tuple[UInt8[np.ndarray, "t height width 3"], Int[np.ndarray, "t 2"], Int[np.ndarray, "t 4"]]:
    """The whole image, and with five views the four corner crops, padded to a common size.

    Args:
        image_hw3: RGB 0..255 at its original resolution.
        num_views: 1 (the whole image) or 5.
        short_edge, max_size: of the shortest-edge resize, in pixels.
        padded: (height, width) to pad to; by default the largest view rounded up to multiples of 32.

    Returns:
        Views, their unpadded (height, width), and their boxes (x0, y0, x1, y1) in original pixels.

    Raises:
        ValueError: `num_views` is neither 1 nor 5, or a view exceeds `padded`.
    """
    height, width = image_hw3.shape[:2]
    views = inference_view_list(height, width, num_views=num_views, short_edge=short_edge, max_size=max_size)
    sizes = np.array([view.size for view in views], np.int32)
    largest = (int(sizes[:, 0].max()), int(sizes[:, 1].max()))
    padded = padded or round_up(largest)
    if largest[0] > padded[0] or largest[1] > padded[1]:
        raise ValueError(f"a {height}x{width} image gives views of {largest}, larger than the padded size {padded}")
    pixels = np.stack([pad_image(view_image(image_hw3, view), padded) for view in views])
    return pixels, sizes, np.array([view.box for view in views], np.int32)


def inference_view_list(
    height: int, width: int, *, num_views: int = 5, short_edge: int = 800, max_size: int = 1333
) -> list[View]:
    """Geometry of `inference_views` without the pixels."""
    if num_views not in (1, 5):
        raise ValueError(f"num_views is {num_views}; choose 1 (whole image) or 5 (whole image and four corners)")
    views = [full_view(height, width, short_edge, max_size)]
    return views + [crop_view(height, width, corner, short_edge, max_size) for corner in range(num_views - 1)]
