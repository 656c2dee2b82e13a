"""Readers of expressions and questions that one text names masks by: the RefCOCO family and ReasonSeg."""

import dataclasses
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw

from esg_jax.input import image_io
from esg_jax.input.narratives import GroundingSourceConfig, MaskIndex, Narratives
from esg_jax.input.readers import CocoInstances, SourceConfig
from esg_jax.input.records import Entities, Record
from esg_jax.masks import MaskSet

_IGNORE = 255
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


def refcoco(config: GroundingSourceConfig) -> Narratives:
    """`refs(*).p` of RefCOCO, RefCOCO+ and RefCOCOg, or `grefs(*).json` of gRefCOCO, with their COCO instances.

    Every sentence is a narrative. Where references name lists of masks (gRefCOCO), an expression may mean several
    things or nothing, so it counts as a question.
    """
    file = config.captions
    references = read_references(file)
    splits = sorted({str(reference.get("split")) for reference in references})
    if config.split not in splits:
        raise ValueError(f"{file} has no split {config.split!r}; set `split` to one of {', '.join(splits)}")
    annotations = config.annotations or str(Path(file).with_name("instances.json"))
    source = CocoInstances(SourceConfig(annotations=annotations, images=config.images))
    index = MaskIndex(source, config)
    several = any(isinstance(reference["ann_id"], Sequence) for reference in references)
    rows = []
    for reference in references:
        if reference["split"] != config.split or index.excluded(reference["image_id"]):
            continue
        name = f"{file}: reference {reference.get('ref_id', '(without id)')}"
        record = index.record(reference["image_id"], name)
        masks = reference["ann_id"] if isinstance(reference["ann_id"], Sequence) else [reference["ann_id"]]
        if reference.get("no_target") or list(masks) == [-1]:
            masks = []
        entities = index.entities(record, masks, name)
        for number, sentence in enumerate(reference["sentences"]):
            text = str(sentence.get("sent") or sentence.get("raw") or "").strip()
            if not text:
                raise ValueError(f"{name}: sentence {sentence.get('sent_id', number)} is empty")
            sentence_id = sentence.get("sent_id", f"{reference.get('ref_id')}_{number}")
            rows.append((record, sentence_id, text, [(0, len(text), entities, len(entities) > 1)]))
    return Narratives(file, source, rows, kind="question" if several else "expression")


class _PlainUnpickler(pickle.Unpickler):
    """Lists, dictionaries, texts and numbers; a pickle that names anything else would run code of its author."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it refers to {module}.{name}; only lists, dictionaries and plain values load")


def read_references(file: str) -> list[dict[str, Any]]:
    """The list in a file of references.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such list, or a pickle that would run code; names file and reference.
    """
    path = Path(file)
    if not file or not path.is_file():
        raise FileNotFoundError(f"file of references not found: {file or '(`captions` is empty)'}")
    try:
        if path.suffix == ".json":
            content = json.loads(path.read_text())
        else:
            with path.open("rb") as stream:
                content = _PlainUnpickler(stream, encoding="latin1").load()  # written by Python 2
    except Exception as error:  # a broken pickle may raise anything
        raise ValueError(f"{file} cannot be read as a list of references: {error}") from error
    if not isinstance(content, list):
        raise ValueError(f"{file} holds a {type(content).__name__}, expected a list of references")
    for number, reference in enumerate(content):
        for key in ("ann_id", "image_id", "split", "sentences"):
            if not isinstance(reference, Mapping) or key not in reference:
                raise ValueError(f"{file}: reference {number} has no {key!r}")
    return content


def reasonseg(config: GroundingSourceConfig) -> Narratives:
    """A split of ReasonSeg: a folder of photographs, and of a JSON file for each with questions and polygons.

    Only what answers the questions is annotated: text is grounded in masks from elsewhere (`entity_masks`).
    """
    folder = Path(config.captions)
    if not config.captions or not folder.is_dir():
        raise FileNotFoundError(f"folder of a ReasonSeg split not found: {config.captions or '(`captions` is empty)'}")
    images = Path(config.images) if config.images else folder
    excluded = config.excluded()
    records, rows = [], []
    for file in sorted(folder.glob("*.json")):
        found = (images / f"{file.stem}{suffix}" for suffix in _IMAGE_SUFFIXES)
        image = next((path for path in found if path.is_file()), images / f"{file.stem}.jpg")
        if file.stem in excluded:
            continue
        content = _read_labelme(file)
        texts, shapes = content.get("text"), content.get("shapes")
        if not isinstance(texts, list) or not isinstance(shapes, list):
            raise ValueError(f"{file} needs the lists 'text' and 'shapes'")
        polygons = [_polygon(shape, f"{file}: shape {number}") for number, shape in enumerate(shapes)]
        records.append(
            ReasonRecord(
                image, image.name, file.stem, *image_io.image_size(image), tuple(p for p in polygons if p is not None)
            )
        )
        for number, text in enumerate(texts):
            if not str(text).strip():
                raise ValueError(f"{file}: text {number} is empty")
            text = str(text).strip()
            entities = [0] if any(value != _IGNORE for value, _ in records[-1].polygons) else []
            rows.append((len(records) - 1, f"{file.stem}_{number}", text, [(0, len(text), entities, False)]))
    return Narratives(config.captions, records, rows, kind="question", complete=False)


def _read_labelme(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("cp1252", errors="replace")  # some files were written so
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, expected a dictionary")
    return content


def _polygon(shape: Mapping[str, Any], name: str) -> tuple[int, tuple[tuple[int, int], ...]] | None:
    """(value, corners) of a shape; None for flags, which mark no region."""
    label, points = str(shape.get("label", "")).lower(), shape.get("points")
    if label == "flag":
        return None
    if not isinstance(points, list) or len(points) < 3 or any(len(point) != 2 for point in points):
        raise ValueError(f"{name} ({label!r}) needs a list 'points' of three or more (x, y)")
    return _IGNORE if "ignore" in label else 1, tuple((int(x), int(y)) for x, y in points)


@dataclasses.dataclass(frozen=True)
class ReasonRecord(Record):
    """Regions as polygons: 1 what is asked for, 255 what an evaluation leaves out; smaller ones are drawn on top."""

    polygons: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]

    def region_map(self) -> UInt8[np.ndarray, "height width"]:
        """0 elsewhere, 1 or 255 within."""
        drawn = [(self._draw(corners), value) for value, corners in self.polygons]
        out = np.zeros((self.height, self.width), np.uint8)
        for inside, value in sorted(drawn, key=lambda pair: -int(pair[0].sum())):
            out[inside] = value
        return out

    def _draw(self, corners) -> Bool[np.ndarray, "height width"]:
        canvas = Image.new("L", (self.width, self.height))
        ImageDraw.Draw(canvas).polygon(corners, fill=1, outline=1)
        return np.asarray(canvas, bool)

    def load_entities(self) -> Entities:
        """One entity: all that is asked for. None when nothing is."""
        layer = (self.region_map() == 1).astype(np.uint8)
        count = int(any(value == 1 for value, _ in self.polygons))
        return Entities.unlabelled(MaskSet([layer], ("target",)[:count]))

    def load_ignore(self) -> Bool[np.ndarray, "height width"] | None:
        ignored = self.region_map() == _IGNORE
        return ignored if ignored.any() else None
