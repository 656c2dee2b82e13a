"""Command line: renders scenes to a folder that the coco_instances reader opens."""

import argparse
import os
import sys

from data.scenes import SceneConfig
from data.scenes.dataset import write_scenes


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.scenes",
        description="Render procedural scenes as a COCO data set (annotations.json and images/). A second call with "
        "the same seed renders only what is missing. About one second per scene and processor core.",
    )
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--count", type=int, required=True, help="number of scenes")
    parser.add_argument("--seed", type=int, default=0, help="use another one for validation")
    parser.add_argument("--long-side", type=int, nargs=2, default=SceneConfig.long_side, metavar=("MIN", "MAX"))
    parser.add_argument("--entities", type=int, nargs=2, default=SceneConfig.entities, metavar=("MIN", "MAX"))
    parser.add_argument("--min-area", type=float, default=SceneConfig.min_area, help="of an entity, as a fraction")
    parser.add_argument("--portrait", type=float, default=SceneConfig.portrait, help="share of upright pictures")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    arguments = parser.parse_args()
    try:
        config = SceneConfig(
            long_side=tuple(arguments.long_side),
            entities=tuple(arguments.entities),
            min_area=arguments.min_area,
            portrait=arguments.portrait,
        )
        print(write_scenes(arguments.out, arguments.count, arguments.seed, config, arguments.workers))
    except ValueError as error:  # sizes that make no scene, a folder with other scenes
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
