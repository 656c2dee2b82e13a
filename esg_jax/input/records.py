"""One annotated image, decoded only when asked, and what a source of such records offers."""

import dataclasses
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64, UInt8

from esg_jax.input import image_io


@dataclasses.dataclass(frozen=True)
class Entities:
    """Decoded annotations of an image.

    layers: label maps at the original resolution; value k + 1 marks entity k, and every entity lies in exactly one.
    labels: contiguous class index of every entity.
    crowd: True for regions that stand for uncounted entities; training leaves them out, evaluation ignores them.
    ids: the annotation ids of the file.
    """

    layers: list[Int[np.ndarray, "height width"]]
    labels: Int32[np.ndarray, "n"]
    crowd: Bool[np.ndarray, "n"]
    ids: tuple[Any, ...]

    def areas(self) -> Int64[np.ndarray, "n"]:
        """Pixels of every entity at the original resolution."""
        total = np.zeros(len(self.labels) + 1, np.int64)
        for labels in self.layers:
            total += np.bincount(labels.ravel(order="K"), minlength=len(total))
        return total[1:]

    def mask(self, index: int) -> Bool[np.ndarray, "height width"]:
        """Mask of one entity at the original resolution."""
        out = np.zeros(self.layers[0].shape, bool)
        for labels in self.layers:
            out |= labels == index + 1
        return out


@dataclasses.dataclass(frozen=True)
class Record:
    """One image of a source; subclasses know how their annotations are stored.

    image: path, or encoded bytes.
    name: the image as its data set calls it, e.g. a file name relative to the image folder.
    height, width: size in pixels that the annotations are made for.
    """

    image: Path | bytes
    name: str
    image_id: int | str
    height: int
    width: int

    def load_image(self) -> UInt8[np.ndarray, "height width 3"]:
        """RGB 0..255.

        Raises:
            FileNotFoundError, ImageError: as `image_io.load_image`.
            ValueError: the file has another size than the annotations.
        """
        shown = self.name if isinstance(self.image, bytes) else str(self.image)
        pixels = image_io.load_image(self.image, shown)
        if pixels.shape[:2] != (self.height, self.width):
            raise ValueError(
                f"image {shown} (id {self.image_id}) is {pixels.shape[0]}x{pixels.shape[1]} pixels, "
                f"its annotations say {self.height}x{self.width} (height x width)"
            )
        return pixels

    def load_entities(self) -> Entities:
        """Decodes the annotations. Raises ValueError that names the annotation when one is malformed."""
        raise NotImplementedError

    def load_ignore(self) -> Bool[np.ndarray, "height width"] | None:
        """Pixels that an evaluation leaves out; None: none."""
        return None


class RecordSource(Protocol):
    """What the pipeline asks of a reader: random access, and an index that needs no decoding.

    sizes: (height, width) of every image.
    num_entities: annotated entities (crowd regions not counted) of every image; -1 when only decoding can tell.
    categories: names in the order of the contiguous labels.
    """

    sizes: Int32[np.ndarray, "records 2"]
    num_entities: Int32[np.ndarray, "records"]
    categories: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...
