"""Turns images with PNG label maps into the COCO JSON that training and evaluation read.

    python -m data.masks_to_coco --images mine/images --masks mine/masks --out mine/annotations.json

The label map of photo.jpg is photo.png in the mask folder: gray or palette values (8 or 16 bit), one value per
entity, 0 for what is not annotated. A bad pair is reported and left out; --strict stops at the first.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from esg_jax.input import image_io
from esg_jax.masks import rle
from esg_jax.masks.write import coco_records


def convert_pair(image: Path, mask: Path, image_id: int, first_id: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """COCO records of one image and its entities.

    Raises:
        FileNotFoundError, ImageError: a file is missing or unreadable.
        ValueError: image and label map differ in size.
    """
    height, width = image_io.load_image(image).shape[:2]
    values = image_io.load_label_map(mask)
    if values.shape != (height, width):
        raise ValueError(f"{mask} is {values.shape[0]}x{values.shape[1]} pixels, {image} is {height}x{width}")
    found = np.unique(values[values > 0])
    labels = np.where(values > 0, np.searchsorted(found, values) + 1, 0)
    annotations = [
        {"id": first_id + number, "image_id": image_id, "category_id": 1, "iscrowd": 0, **record}
        for number, record in enumerate(coco_records(rle.encode_labels(labels, len(found))))
    ]
    return {"id": image_id, "file_name": image.name, "height": height, "width": width}, annotations


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.masks_to_coco", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", required=True, help="folder of images")
    parser.add_argument("--masks", required=True, help="folder of PNG label maps of the same names")
    parser.add_argument("--out", required=True, help="JSON to write; its file names are relative to --images")
    parser.add_argument("--strict", action="store_true", help="stop at the first bad pair")
    arguments = parser.parse_args()
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "entity"}]}
    bad = 0
    try:
        paths = image_io.list_images(arguments.images)
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
    for path in track(paths, "reading masks", disable=not sys.stdout.isatty()):
        mask = Path(arguments.masks) / f"{path.stem}.png"
        number = len(content["images"]) + 1
        try:
            image, annotations = convert_pair(path, mask, number, len(content["annotations"]) + 1)
        except (ValueError, FileNotFoundError) as error:
            if arguments.strict:
                sys.exit(f"error: {error}")
            print(f"left out: {error}", file=sys.stderr)
            bad += 1
            continue
        content["images"].append(image)
        content["annotations"] += annotations
    if not content["images"]:
        sys.exit(f"error: none of {len(paths)} images in {arguments.images} has a usable label map")
    Path(arguments.out).write_text(json.dumps(content))
    print(f"{arguments.out}: {len(content['images'])} images, {len(content['annotations'])} entities, {bad} left out")


if __name__ == "__main__":
    main()
