"""Ids of the images that the RefCOCO family evaluates on, so that training leaves them out.

    python -m data.refer_images 'refer_seg/refcoco/refs(unc).p' 'refer_seg/refcocog/refs(umd).p' --out refcoco_eval.txt

They lie in COCO's train2017, and so among the narratives of Panoptic Narrative Grounding:
`GroundingSourceConfig(reader="png", exclude="refcoco_eval.txt")`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from esg_jax.input.referring_readers import read_references


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("references", nargs="+", help="refs(*).p or grefs(*).json")
    parser.add_argument("--keep", nargs="*", default=["train"], help="splits that may be trained on (default: train)")
    parser.add_argument("--out", type=Path, required=True, help="text file, one id a line")
    args = parser.parse_args(arguments)
    try:
        references = [reference for file in args.references for reference in read_references(file)]
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    images = sorted({int(r["image_id"]) for r in references if r["split"] not in args.keep})
    args.out.write_text("".join(f"{image}\n" for image in images))
    print(f"{len(images)} images in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
