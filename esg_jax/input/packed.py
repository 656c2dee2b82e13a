"""A data set in one file: encoded images and their masks as records of an ArrayRecord (`python -m data.pack`).

Record i is a line of JSON (id, name, size, annotations), then the encoded image. The last record is the index: format,
categories, and size and number of entities of every image, so that a source opens without decoding anything.
"""

import io
import json
from collections.abc import Iterable
from pathlib import Path

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from esg_jax.input.readers import CocoRecord, SourceConfig, register_reader
from esg_jax.input.records import Record
from esg_jax.masks import rle

FORMAT = "esg_jax packed 1"


@register_reader("packed")
class Packed:
    """File that `write_pack` wrote; `annotations` names it, `images` and `masks` are not used.

    Raises:
        ValueError: another file, or one that was cut off.
        FileNotFoundError: no such file.
    """

    def __init__(self, config: SourceConfig):
        self.file = config.annotations
        if not Path(self.file).is_file():
            raise FileNotFoundError(f"packed data file not found: {self.file or '(annotations is empty)'}")
        try:
            self._records = grain.sources.ArrayRecordDataSource(self.file)
            index = json.loads(self._records[len(self._records) - 1])
            if index["format"] != FORMAT:
                raise ValueError(f"format {index['format']!r}")
        except (RuntimeError, ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{self.file} is no file of `python -m data.pack`, or it was cut off: {error}") from error
        self.categories = tuple(index["categories"])
        self.sizes = np.array(index["sizes"], np.int32).reshape(-1, 2)
        self.num_entities = np.array(index["num_entities"], np.int32)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> CocoRecord:
        if not 0 <= index < len(self):  # the one after the last is the index
            raise IndexError(index)
        head, image = self._records[index].split(b"\n", 1)
        facts = json.loads(head)
        annotations = json.dumps(facts["annotations"]).encode()
        return CocoRecord(image, facts["name"], facts["id"], facts["height"], facts["width"], annotations, self.file)

    def __repr__(self) -> str:
        return f"Packed({self.file}, {len(self)} images)"


def write_pack(
    file: str | Path,
    records: Iterable[Record],
    categories: Iterable[str] | None,
    *,
    long_side: int = 0,
    quality: int = 90,
    max_bytes: int | None = None,
) -> int:
    """Writes a packed file. Images keep their encoded bytes unless they shrink.

    Args:
        file: written under another name first; an existing one is replaced when all is there.
        records: images with entities; ids and names need not be unique.
        categories: names in the order of the records' labels; None stores every entity as `entity`, with label 0.
        long_side: larger images are reduced to this many pixels, entities by nearest neighbour; 0 keeps every size.
        quality: of the JPEGs of reduced images.
        max_bytes: limit of the file.

    Returns:
        Bytes of the file.

    Raises:
        ValueError: the file would be larger than `max_bytes`; or as reading the records does.
        FileNotFoundError: an image or mask is missing.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    sizes, counts, written = [], [], 0
    writer = ArrayRecordWriter(str(partial), "group_size:1")
    try:
        for record in records:
            head, image = _packed(record, long_side, quality, keep_labels=categories is not None)
            blob = json.dumps(head).encode() + b"\n" + image
            written += len(blob)
            if max_bytes is not None and written > max_bytes:
                raise ValueError(
                    f"{file}: {len(sizes) + 1} images take {written / 1e6:.1f} MB, the limit is {max_bytes / 1e6:.1f}; "
                    "reduce the images further, or take fewer"
                )
            writer.write(blob)
            sizes.append((head["height"], head["width"]))
            counts.append(sum(not crowd for _, _, crowd, _ in head["annotations"]))
        names = ["entity"] if categories is None else list(categories)
        index = {"format": FORMAT, "categories": names, "sizes": sizes, "num_entities": counts}
        writer.write(json.dumps(index).encode())
        writer.close()
        partial.replace(file)
    finally:
        if writer.is_open():
            writer.close()
        partial.unlink(missing_ok=True)
    return file.stat().st_size


def _packed(record: Record, long_side: int, quality: int, *, keep_labels: bool) -> tuple[dict, bytes]:
    """Facts and encoded image."""
    pixels, entities = record.load_image(), record.load_entities()  # also checks both
    scale = min(1.0, long_side / max(record.height, record.width)) if long_side else 1.0
    height, width = (max(1, round(side * scale)) for side in (record.height, record.width))
    if scale < 1:
        stream = io.BytesIO()
        Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS).save(stream, "JPEG", quality=quality)
        image = stream.getvalue()
    else:
        image = record.image if isinstance(record.image, bytes) else Path(record.image).read_bytes()
    labels = entities.labels if keep_labels else np.zeros_like(entities.labels)
    annotations = []
    for layer in entities.layers:
        reduced = np.asarray(Image.fromarray(layer.astype(np.int32)).resize((width, height), Image.Resampling.NEAREST))
        codes = rle.encode_labels(reduced, len(labels))
        annotations += [
            (entities.ids[k], int(labels[k]), int(entities.crowd[k]), rle.to_json(codes[k]))
            for k in np.flatnonzero(rle.areas(codes))
        ]
    facts = {"id": record.image_id, "name": record.name, "height": height, "width": width, "annotations": annotations}
    return facts, image
