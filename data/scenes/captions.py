"""Captions of procedural scenes whose noun phrases are linked to entities.

A caption says only what is known: what shape was drawn (or that a region is background), which colour most of its
visible pixels have, where it is, and how large. A phrase is chosen so that it fits the entities it is linked to and no
other entity of the scene; plural phrases carry the exact number.
"""

import argparse
import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from data.scenes import SceneConfig, scene_layout
from data.scenes.layout import Layout
from esg_jax.input.image_io import load_image
from esg_jax.text.prompts import number_word

# What a silhouette is called, one and several; None: not said of several.
NAMES = {
    "blob": ("blob", "blobs"),
    "superellipse": ("rounded shape", "rounded shapes"),
    "quad": ("panel", "panels"),
    "polygon": ("polygon", "polygons"),
    "cuboid": ("box", "boxes"),
    "vessel": ("bottle", "bottles"),
    "figure": ("figure", "figures"),
    "furniture": ("piece of furniture", "pieces of furniture"),
    "vehicle": ("vehicle", "vehicles"),
    "plant": ("plant", "plants"),
    "shaggy": ("shaggy shape", "shaggy shapes"),
    "ring": ("ring", "rings"),
    "text": ("letters", None),
    "bunch": ("bunch of pieces", "bunches of pieces"),
    "pole": ("pole", "poles"),
    "wire": ("wire", "wires"),
    "fence": ("fence", "fences"),
    "sky": ("sky", None),
    "background": ("background area", "background areas"),
}
PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the middle", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
# Fractions of the picture: smaller is not mentioned, "small" and "large" begin here.
MENTIONED, SMALL, LARGE = 0.001, 0.004, 0.1
OPENINGS = ("There is ", "A picture of ", "This scene shows ", "One can see ", "")
CAPTIONS = 4


@dataclasses.dataclass(frozen=True)
class Thing:
    """What can be said of an entity; empty text where nothing certain can be said."""

    kind: str
    colour: str
    place: str
    size: str
    area: float


def describe(image_hw3: UInt8[np.ndarray, "h w 3"], layout: Layout) -> list[Thing]:
    """What is known of every entity of a scene."""
    labels = layout.labels
    height, width = labels.shape
    count = len(layout.items)
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    rows, columns = np.arange(height), np.arange(width)
    by_row = np.stack([np.bincount(row, minlength=count + 1) for row in labels])[:, 1:]
    by_column = np.stack([np.bincount(column, minlength=count + 1) for column in labels.T])[:, 1:]
    y, x = rows @ by_row / areas / height, columns @ by_column / areas / width
    step = max(1, max(height, width) // 500)
    colours = colour_names(image_hw3[::step, ::step])
    shown = labels[::step, ::step]
    out = []
    for k, item in enumerate(layout.items):
        kind = item.kind
        if item.mask is None:
            # Only the sky is drawn as such; other regions may be anything.
            kind = "sky" if layout.style == "outdoor" and item.depth == 1.0 else "background"
        share = areas[k] / labels.size
        votes = np.bincount(colours[shown == k + 1], minlength=len(COLOURS))
        clear = votes.sum() and votes.max() >= 0.6 * votes.sum()
        out.append(
            Thing(
                kind,
                COLOURS[int(votes.argmax())] if clear else "",
                PLACES[int(3 * y[k])][int(3 * x[k])],
                "small" if share < SMALL else "large" if share > LARGE and kind != "background" else "",
                share,
            )
        )
    return out


COLOURS = ("black", "gray", "white", "red", "brown", "orange", "yellow", "green", "blue", "purple", "pink")


def colour_names(image_hw3: UInt8[np.ndarray, "h w 3"]) -> Int[np.ndarray, "h w"]:
    """Index into `COLOURS` of every pixel, by hue, saturation and value."""
    hue, saturation, value = np.moveaxis(np.asarray(Image.fromarray(image_hw3).convert("HSV")).astype(int), -1, 0)
    hue = hue * 360 / 255
    names = np.select(
        [hue < 15, hue < 45, hue < 70, hue < 165, hue < 260, hue < 300, hue < 345],
        [COLOURS.index(name) for name in ("red", "orange", "yellow", "green", "blue", "purple", "pink")],
        COLOURS.index("red"),
    )
    dark = (names == COLOURS.index("orange")) & ((value < 190) | (saturation < 110))
    names = np.where(dark, COLOURS.index("brown"), names)
    gray = np.select([value < 60, value < 200], [COLOURS.index("black"), COLOURS.index("gray")], COLOURS.index("white"))
    return np.where((saturation < 45) | (value < 40), gray, names)


def phrases_for(things: Sequence[Thing], entity: int) -> list[tuple[str, tuple[int, ...]]]:
    """Phrases that fit `entity`, shortest first, with all entities that they fit; each names either it alone or a set.

    A property that is not known of another entity might be true of it: such an entity counts as fitting too, and a
    phrase that it spoils is left out.
    """
    own, out = things[entity], []
    for fields in ((), ("colour",), ("size",), ("place",), ("colour", "place"), ("size", "colour", "place")):
        if not all(getattr(own, field) for field in fields):
            continue
        fits = [
            k
            for k, other in enumerate(things)
            if other.kind == own.kind and all(getattr(other, field) in (getattr(own, field), "") for field in fields)
        ]
        same = [k for k in fits if all(getattr(things[k], field) == getattr(own, field) for field in fields)]
        if same != fits or any(things[k].area < MENTIONED for k in fits):
            continue
        singular, plural = NAMES[own.kind]
        before = " ".join(getattr(own, field) for field in ("size", "colour") if field in fields)
        after = f" {own.place}" if "place" in fields else ""
        if len(fits) == 1:
            out.append((f"{before} {singular}{after}".strip(), tuple(fits)))
        elif plural and len(fits) <= 9:
            out.append((f"{number_word(len(fits))} {before} {plural}{after}".replace("  ", " "), tuple(fits)))
    return out


def make_caption(rng: np.random.Generator, things: Sequence[Thing]) -> tuple[str, list[dict[str, Any]]]:
    """One caption and its phrases: text, start, end, category, plural and entities (rows of `things`)."""
    order = rng.permutation(len(things))
    wanted = int(rng.integers(2, 7))
    chosen: list[tuple[str, tuple[int, ...]]] = []
    taken: set[int] = set()
    for entity in order.tolist():
        options = [(text, fits) for text, fits in phrases_for(things, entity) if not taken & set(fits)]
        if options and len(chosen) < wanted:
            # Short phrases are the natural ones; longer ones teach the attributes.
            pick = 0 if rng.random() < 0.5 else int(rng.integers(len(options)))
            chosen.append(options[pick])
            taken |= set(options[pick][1])
    caption, phrases = OPENINGS[int(rng.integers(len(OPENINGS)))], []
    if caption == "There is " and chosen and len(chosen[0][1]) > 1:
        caption = "There are "
    for number, (text, fits) in enumerate(chosen):
        if number:
            caption += " and " if number == len(chosen) - 1 else ", "
        category = things[fits[0]].kind
        if len(fits) == 1 and NAMES[category][1] is not None:
            caption += "an " if text[0] in "aeiou" else "a "
        start = len(caption)
        caption += text
        phrase = {"text": text, "start": start, "end": len(caption), "category": category}
        phrases.append({**phrase, "plural": len(fits) > 1, "entities": list(fits)})
    if phrases and phrases[0]["start"] == 0:
        phrases[0]["text"] = text = phrases[0]["text"].capitalize()
        caption = text[0] + caption[1:]
    return caption[:1].upper() + caption[1:] + ".", phrases


def write_captions(folder: str | Path, workers: int = 1) -> Path:
    """Writes `captions.json` beside the `annotations.json` of `write_scenes`, for the "linked_captions" reader.

    Raises:
        FileNotFoundError: no scenes there.
        ValueError: the scenes come out differently with the installed libraries than when they were rendered.
    """
    folder = Path(folder)
    file = folder / "annotations.json"
    if not file.is_file():
        raise FileNotFoundError(f"no scenes in {folder}: run `python -m data.scenes --out {folder}` first")
    content = json.loads(file.read_text())
    fields = {key: tuple(v) if isinstance(v, list) else v for key, v in content["info"]["config"].items()}
    annotations: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        annotations[annotation["image_id"]].append(annotation)
    caption_one = functools.partial(
        _caption_one, folder=folder, seed=content["info"]["seed"], config=SceneConfig(**fields)
    )
    items = [(image, annotations[image["id"]]) for image in content["images"]]
    if workers > 1:
        import concurrent.futures
        import multiprocessing

        # Spawned, not forked: the caller may run JAX threads.
        with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            parts = list(pool.map(caption_one, items, chunksize=4))
    else:
        parts = list(map(caption_one, items))
    captions = [caption for part in parts for caption in part]
    for number, caption in enumerate(captions, start=1):
        caption["id"] = number
    out = folder / "captions.json"
    out.write_text(json.dumps({"info": {"description": "what is known of procedural scenes"}, "captions": captions}))
    return out


def _caption_one(item: tuple[dict[str, Any], list[dict[str, Any]]], *, folder: Path, seed: int, config: SceneConfig):
    image, annotations = item
    _, layout = scene_layout((seed, image["id"] - 1), config)
    areas = np.bincount(layout.labels.ravel(), minlength=len(layout.items) + 1)[1:]
    if areas.tolist() != [annotation["area"] for annotation in annotations]:
        raise ValueError(
            f"scene {image['file_name']} of {folder} comes out differently now than when it was rendered (other "
            "versions of numpy, Pillow or scikit-image); render the scenes again"
        )
    things = describe(load_image(folder / image["file_name"]), layout)
    rng = np.random.default_rng((seed, image["id"], 1))
    out = []
    for _ in range(CAPTIONS):
        caption, phrases = make_caption(rng, things)
        for phrase in phrases:
            phrase["mask_ids"] = [annotations[k]["id"] for k in phrase.pop("entities")]
        if phrases:
            out.append({"image_id": image["id"], "caption": caption, "phrases": phrases})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.scenes.captions",
        description="Writes captions with linked noun phrases (captions.json) beside the scenes of "
        "`python -m data.scenes`, for the linked_captions reader with annotations.json as its masks.",
    )
    parser.add_argument("folder", help="folder of scenes")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    arguments = parser.parse_args()
    print(write_captions(arguments.folder, arguments.workers))


if __name__ == "__main__":
    main()
