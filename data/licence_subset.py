"""Keeps the images of an annotation file whose Flickr licence allows derived works to be redistributed.

    python -m data.licence_subset --annotations entity_train.json --coco panoptic_train2017.json --out kept.json

COCO records the licence of every image: 4 is CC BY 2.0, 7 "no known copyright restrictions", 8 a work of the United
States government. The others forbid commercial use or derived works (1, 2, 3, 6) or ask for the same licence (5).
Images without a COCO licence (other sources) are left out. CC BY asks for attribution: every image kept carries the
licence and the Flickr address, and `attribution` lists them.
"""

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

REDISTRIBUTABLE = (4, 7, 8)


def keep_licences(
    content: Mapping[str, Any], coco: Iterable[Mapping[str, Any]], allowed: Iterable[int] = REDISTRIBUTABLE
) -> dict[str, Any]:
    """The part of a COCO-style annotation file whose images have an allowed licence.

    Args:
        content: the annotation file, perhaps with linked captions. An image is matched by ``source_id`` when ``source``
            starts with "coco", or by ``id`` when images have no ``source``.
        coco: official COCO files with ``licenses`` and, per image, ``license`` and ``flickr_url``.
        allowed: licence ids.

    Raises:
        ValueError: no image is left.
    """
    coco = list(coco)
    known = {image["id"]: image for file in coco for image in file["images"]}
    licences = {licence["id"]: licence for file in coco for licence in file["licenses"]}
    allowed = set(allowed)
    images = []
    for image in content["images"]:
        if not image.get("source", "coco").startswith("coco"):
            continue
        official = known.get(image.get("source_id", image["id"]), {})
        if official.get("license") in allowed:
            images.append({**image, "license": official["license"], "flickr_url": official["flickr_url"]})
    if not images:
        raise ValueError(f"no image has a licence in {sorted(allowed)}; are these the COCO files of the same split?")
    kept = {image["id"] for image in images}
    of_images = {
        name: [row for row in content[name] if row["image_id"] in kept]
        for name in ("annotations", "captions")
        if name in content
    }
    used = [licences[number] for number in sorted({image["license"] for image in images})]
    return {**content, **of_images, "images": images, "licenses": used}


def attribution(content: Mapping[str, Any]) -> str:
    """One line per image: file, licence, source; for a model card."""
    names = {licence["id"]: f"{licence['name']} ({licence['url']})" for licence in content["licenses"]}
    return "\n".join(f"{i['file_name']}: {names[i['license']]}, {i['flickr_url']}" for i in content["images"])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.licence_subset", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--annotations", required=True, help="COCO-style JSON to cut down")
    parser.add_argument("--coco", required=True, nargs="+", help="official COCO JSON files that know the licences")
    parser.add_argument("--out", required=True, help="JSON to write; image paths stay as they are")
    parser.add_argument("--licences", type=int, nargs="+", default=REDISTRIBUTABLE, help="COCO licence ids to keep")
    arguments = parser.parse_args()
    content = json.loads(Path(arguments.annotations).read_text())
    coco = [json.loads(Path(file).read_text()) for file in arguments.coco]
    kept = keep_licences(content, coco, arguments.licences)
    Path(arguments.out).write_text(json.dumps(kept))
    print(attribution(kept))
    print(f"{len(kept['images'])} of {len(content['images'])} images, {len(kept['annotations'])} entities")


if __name__ == "__main__":
    main()
