"""Puts together what the packaged model is trained on: photographs, collages of them, and scenes.

    python -m data.demo_mix --realdata ../shared/realdata --out datasets/demo
    python train.py --config=configs/demo.py:datasets/demo --workdir=runs/demo

Writes annotation files, folders of generated pictures and `mix.json`, which configs/demo.py reads; photographs stay
where they are. Without --realdata the mix is scenes alone. The photographs are COCO's (as for every public checkpoint;
each keeps its own licence) and 44 facades (CC BY 4.0); --research adds BSDS500 and MSRC v2, whose terms allow research
only. No photograph shows a part of a validation image of entity_mini: the command compares their pixels and stops
otherwise. A second call makes only what is missing.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.collage import CollageConfig, CollageSource, write_collages
from data.leaks import find_leaks
from data.licence_subset import keep_licences
from data.scenes import SceneConfig
from data.scenes.dataset import write_scenes
from esg_jax.input.image_io import ImageError
from esg_jax.input.readers import read_json

DENSE = 0.1
COCO = "COCO photographs, each with its own licence (annotations CC BY 4.0)"


@dataclasses.dataclass(frozen=True)
class Photographs:
    """A source of photographs below the realdata folder.

    file: its annotations. images: what file names are relative to. weight: in the mixture. exhaustive: see
    `SourceConfig`. unlabelled: images with this fraction of unlabelled pixels, above the first to the second number.
    collages: its entities are cut out. research: only for models under non-commercial terms.
    """

    file: str
    images: str
    licence: str
    weight: float
    exhaustive: bool = True
    unlabelled: tuple[float, float] = (-1.0, 1.0)
    collages: bool = True
    research: bool = False


PHOTOGRAPHS = {
    # Of one panoptic image in four, 14% and more is unlabelled: things nobody asked the annotators for.
    "coco_panoptic": Photographs("entity_mini/entity_train.json", ".", COCO, 2.4, unlabelled=(-1.0, DENSE)),
    "coco_panoptic_partial": Photographs(
        "entity_mini/entity_train.json", ".", COCO, 0.6, exhaustive=False, unlabelled=(DENSE, 1.0)
    ),
    "coco_instances": Photographs(
        "coco_panoptic_mini/annotations/instances_train2017.json",
        "coco_panoptic_mini/train2017",
        COCO,
        1.5,
        exhaustive=False,
    ),
    "coco_instances_more": Photographs("more/coco_instances_more/annotations.json", ".", COCO, 0.6, exhaustive=False),
    # Windows and balconies are cut out of the facades, so nothing here is a whole to paste.
    "facades": Photographs(
        "more/facades_1024/annotations.json", ".", "CC BY 4.0", 0.3, exhaustive=False, collages=False
    ),
    "bsds500": Photographs(
        "more/bsds500/annotations.json", ".", "BSDS terms: non-commercial research", 3.0, collages=False, research=True
    ),
    "msrc_v2": Photographs(
        "more/msrc_v2/annotations.json",
        ".",
        "Microsoft Research Cambridge: non-commercial research",
        1.0,
        exhaustive=False,
        collages=False,
        research=True,
    ),
}
# Few large entities first: the shapes of things are learnt from these, crowds and wires from the others.
SCENES = {"scenes_easy": {"entities": (3, 10), "min_area": 0.01}, "scenes": {"min_area": 0.0004}}
WEIGHTS = {"scenes_easy": 0.7, "scenes": 1.3, "collages": 4.0}


def write_mix(
    out: str | Path,
    realdata: str | Path | None,
    *,
    research: bool = False,
    scenes: int = 3000,
    collages: int = 4000,
    long_side: tuple[int, int] = (512, 640),
    seed: int = 20,
    workers: int = 1,
) -> Path:
    """Writes the mix, unless it is there; gives the path of `mix.json`.

    Args:
        realdata: folder with entity_mini, coco_panoptic_mini and more; None: scenes alone.
        research: add the sources that must not go into weights for every use.
        scenes: how many, a third of them easy. collages: how many.
        long_side: of scenes and collages, in pixels.

    Raises:
        ValueError: a training photograph shows a validation image, a file is malformed, or `out` holds a mix of other
            settings.
        FileNotFoundError, ImageError: something is missing from `realdata` or unreadable.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    sources: dict[str, dict[str, Any]] = {}
    if realdata is not None:
        sources = _write_photographs(out, Path(realdata), research)
        check_photographs(out, sources, Path(realdata))
    counts = {"scenes_easy": scenes // 3, "scenes": scenes - scenes // 3}
    for number, (name, options) in enumerate(SCENES.items()):
        if counts[name]:
            write_scenes(out / name, counts[name], seed + number, SceneConfig(long_side, **options), workers)
            sources[name] = _generated(name, "CC0")
    if sources and realdata is not None and collages:
        cut = [
            CollageSource(str(out / sources[name]["annotations"]), str(out / sources[name]["images"]), spec.exhaustive)
            for name, spec in PHOTOGRAPHS.items()
            if spec.collages and name in sources
        ]
        write_collages(out / "collages", collages, cut, seed + len(SCENES), CollageConfig(long_side), workers)
        sources["collages"] = _generated("collages", COCO)
    if not sources:
        raise ValueError("nothing to write: no realdata folder and no scenes")
    file = out / "mix.json"
    file.write_text(json.dumps({"research": research, "sources": sources}, indent=2))
    return file


def _generated(name: str, licence: str) -> dict[str, Any]:
    return {
        "annotations": f"{name}/annotations.json",
        "images": name,
        "exhaustive": True,
        "weight": WEIGHTS[name],
        "licence": licence,
    }


def _write_photographs(out: Path, realdata: Path, research: bool) -> dict[str, dict[str, Any]]:
    sources = {}
    for name, spec in PHOTOGRAPHS.items():
        if spec.research and not research:
            continue
        content = read_json(str(realdata / spec.file))
        if name.startswith("coco_panoptic"):
            # entity_mini also holds CamVid and ADE20K, which no weights may come from.
            official = read_json(str(realdata / "coco_panoptic_mini/annotations/panoptic_train2017.json"))
            content = keep_licences(content, [official], [licence["id"] for licence in official["licenses"]])
        low, high = spec.unlabelled
        images = [image for image in content["images"] if low < image.get("unlabelled_fraction", 0.0) <= high]
        kept = {image["id"] for image in images}
        annotations = [row for row in content["annotations"] if row["image_id"] in kept]
        content = {**content, "images": images, "annotations": annotations}
        (out / f"{name}.json").write_text(json.dumps(content))
        sources[name] = {
            "annotations": f"{name}.json",
            "images": os.path.relpath(realdata / spec.images, out),
            "exhaustive": spec.exhaustive,
            "weight": spec.weight,
            "licence": spec.licence,
        }
    return sources


def photographs_of(folder: Path, sources: Mapping[str, Mapping[str, Any]]) -> dict[str, Path]:
    """Files of all photographs of a mix, by "source/file name"."""
    files = {}
    for name, source in sources.items():
        if name not in PHOTOGRAPHS:
            continue
        content = read_json(str(folder / source["annotations"]))
        files |= {f"{name}/{i['file_name']}": folder / source["images"] / i["file_name"] for i in content["images"]}
    return files


def validation_images(realdata: Path) -> dict[str, Path]:
    """The images that results are reported on."""
    content = read_json(str(realdata / "entity_mini/entity_val.json"))
    return {image["file_name"]: realdata / image["file_name"] for image in content["images"]}


def check_photographs(folder: Path, sources: Mapping[str, Mapping[str, Any]], realdata: Path) -> None:
    """Raises ValueError when a photograph of the mix shows a part of a validation image."""
    leaks = find_leaks(photographs_of(folder, sources), validation_images(realdata))
    if leaks:
        shown = ", ".join(f"{train} shows {val}" for train, val in leaks[:3])
        raise ValueError(f"{len(leaks)} validation images are in the training data: {shown}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.demo_mix", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--realdata", help="folder with entity_mini, coco_panoptic_mini and more")
    parser.add_argument("--research", action="store_true", help="add sources whose terms allow research only")
    parser.add_argument("--scenes", type=int, default=3000, help="a third of them easy")
    parser.add_argument("--collages", type=int, default=4000)
    parser.add_argument("--long-side", type=int, nargs=2, default=(512, 640), metavar=("MIN", "MAX"))
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    arguments = parser.parse_args()
    options = {name: getattr(arguments, name) for name in ("research", "scenes", "collages", "seed", "workers")}
    try:
        file = write_mix(arguments.out, arguments.realdata, long_side=tuple(arguments.long_side), **options)
    except (ValueError, FileNotFoundError, ImageError) as error:
        sys.exit(f"error: {error}")
    print(file)


if __name__ == "__main__":
    main()
