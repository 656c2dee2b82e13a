"""One annotated image, decoded only when asked, and what a source of such records offers."""

import dataclasses
from pathlib import Path
from typing import Protocol, Self

import numpy as np
from jaxtyping import Bool, Int32, UInt8

from esg_jax.input import image_io
from esg_jax.masks import MaskSet


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entities(MaskSet):
    """Decoded annotations of an image, at its original resolution; `ids` are those of the file.

    labels: contiguous class index of every entity.
    crowd: True for regions that stand for uncounted entities; training leaves them out, evaluation ignores them.
    """

    labels: Int32[np.ndarray, "n"]
    crowd: Bool[np.ndarray, "n"]

    @classmethod
    def unlabelled(cls, masks: MaskSet) -> Self:
        """Masks that have no class; none is a crowd."""
        count = len(masks)
        return cls(layers=masks.layers, ids=masks.ids, labels=np.zeros(count, np.int32), crowd=np.zeros(count, bool))


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
