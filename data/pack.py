"""Packs COCO-format data sets into one file that trains anywhere, and unpacks it for evaluation.

    python -m data.pack --out train.arrayrecord --long-side 640 \\
        --source coco/annotations/panoptic_train2017.json coco/train2017 coco_panoptic \\
        --source scenes/annotations.json
    python train.py --config=configs/gpu_demo.py:train.arrayrecord --workdir=runs/gpu_demo
    python -m data.pack --mix datasets/demo --out datasets/packed --long-side 320 --count 400    # a file per source
    python -m data.pack --unpack val.arrayrecord --out val    # val/annotations.json and the images

Any config reads it: `--config.data.sources.NAME.reader=packed --config.data.sources.NAME.annotations=FILE`.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.progress import track

from esg_jax.input.packed import Packed, write_pack
from esg_jax.input.readers import SourceConfig, open_source, read_json
from esg_jax.input.records import RecordSource
from esg_jax.masks import rle
from esg_jax.masks.write import coco_records


def pack(
    out: Path,
    configs: Sequence[SourceConfig],
    *,
    long_side: int = 0,
    quality: int = 90,
    max_megabytes: float = 40,
    count: int = 0,
) -> str:
    """Writes `out`, with at most `count` images of each source (0: all), and says what is in it.

    The labels of the sources are kept if all have the same categories; otherwise everything becomes `entity`.

    Raises:
        ValueError, FileNotFoundError: as `open_source` and `write_pack`.
    """
    sources = [open_source(config) for config in configs]
    categories = sources[0].categories
    same = all(source.categories == categories for source in sources)
    size = write_pack(
        out,
        _records(sources, count),
        categories if same else None,
        long_side=long_side,
        quality=quality,
        max_bytes=int(max_megabytes * 1e6),
    )
    packed = Packed(SourceConfig(annotations=str(out)))
    return f"{out}: {len(packed)} images, {packed.num_entities.sum()} entities, {size / 1e6:.1f} MB"


def pack_mix(folder: Path, out: Path, *, max_megabytes: float = 40, **options) -> str:
    """Packs every source of a `mix.json` into a file of its own, and writes the mix.json of those into `out`.

    Args:
        folder: with the mix.json of `data.demo_mix`.
        max_megabytes: limit of all files together.
        options: of `pack`.

    Raises:
        ValueError, FileNotFoundError: as `pack`; or there is no mix.json.
    """
    mix = read_json(str(folder / "mix.json"))
    packed, left = {}, max_megabytes
    for name, row in mix["sources"].items():
        paths = {key: str(folder / row[key]) for key in ("annotations", "images", "masks") if row.get(key)}
        file = out / f"{name}.arrayrecord"
        print(
            pack(
                file, [SourceConfig(reader=row.get("reader", "coco_instances"), **paths)], max_megabytes=left, **options
            )
        )
        left -= file.stat().st_size / 1e6
        kept = {key: row[key] for key in ("weight", "exhaustive", "licence") if key in row}
        packed[name] = {"reader": "packed", "annotations": file.name, "images": ".", **kept}
    (out / "mix.json").write_text(json.dumps({**mix, "sources": packed}, indent=1))
    return f"{out}: {len(packed)} sources, {max_megabytes - left:.1f} MB"


def _records(sources: Sequence[RecordSource], count: int):
    rows = []
    for source in sources:
        kept = min(count, len(source)) if count else len(source)
        rows += [(source, index * len(source) // kept) for index in range(kept)]  # spread over the whole source
    for source, index in track(rows, "packing", disable=not sys.stdout.isatty()):
        yield source[index]


def unpack(file: Path, out: Path) -> str:
    """Writes the images and a COCO annotations.json into the folder `out`, and says so.

    Raises:
        ValueError, FileNotFoundError: as `Packed`; or a name that leads out of the folder.
    """
    source = Packed(SourceConfig(annotations=str(file)))
    content = {"categories": [{"id": k + 1, "name": name} for k, name in enumerate(source.categories)]}
    content |= {"images": [], "annotations": []}
    for index in range(len(source)):
        record = source[index]
        name = f"{index:06d}_{Path(record.name).name}"  # unique, whatever the sources call it
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(record.image)
        size = {"height": record.height, "width": record.width}
        content["images"].append({"id": index + 1, "file_name": name, **size})
        for _, label, crowd, code in json.loads(record.annotations):
            number = len(content["annotations"]) + 1
            entry = {"id": number, "image_id": index + 1, "category_id": label + 1, "iscrowd": crowd}
            mask = rle.from_annotation(code, (record.height, record.width))
            content["annotations"].append({**entry, **coco_records([mask])[0]})
    out.mkdir(parents=True, exist_ok=True)
    (out / "annotations.json").write_text(json.dumps(content))
    return f"{out}: {len(content['images'])} images, {len(content['annotations'])} annotations"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.pack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="file to write; with --mix or --unpack the folder")
    parser.add_argument(
        "--source",
        nargs="+",
        action="append",
        metavar="PATH",
        help="annotation file, folder of images (default: that of the file), reader (default: coco_instances)",
    )
    parser.add_argument("--mix", type=Path, metavar="FOLDER", help="pack all sources of the mix.json in this folder")
    parser.add_argument("--long-side", type=int, default=0, help="reduce larger images to this many pixels")
    parser.add_argument("--count", type=int, default=0, help="at most so many images of each source")
    parser.add_argument("--quality", type=int, default=90, help="JPEG quality of reduced images")
    parser.add_argument("--max-megabytes", type=float, default=40, help="limit of the file")
    parser.add_argument("--unpack", type=Path, metavar="FILE", help="write the images and annotations.json of a pack")
    arguments = parser.parse_args()
    if sum(bool(way) for way in (arguments.source, arguments.mix, arguments.unpack)) != 1:
        parser.error("give --source (once or more) or --mix FOLDER to pack, or --unpack FILE")
    if any(len(words) > 3 for words in arguments.source or ()):
        parser.error("--source takes an annotation file, a folder of images and a reader")
    options = {name: getattr(arguments, name) for name in ("long_side", "quality", "max_megabytes", "count")}
    try:
        if arguments.unpack:
            print(unpack(arguments.unpack, arguments.out))
        elif arguments.mix:
            print(pack_mix(arguments.mix, arguments.out, **options))
        else:
            configs = [
                SourceConfig(**dict(zip(("annotations", "images", "reader"), words, strict=False)))
                for words in arguments.source
            ]
            print(pack(arguments.out, configs, **options))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
