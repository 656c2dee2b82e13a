"""Evaluates a model, or scores again the predictions that an earlier run saved.

    python eval.py --config=configs/recipes/entity_mini.py --workdir=runs/entity_mini --views=5
    python eval.py --config=configs/recipes/sets.py:coco_panoptic --checkpoint=model.safetensors --out=runs/coco
    python eval.py --config=configs/recipes/grounding_mini.py --workdir=runs/gella
    python eval.py --config=configs/recipes/entity_mini.py --predictions=runs/x/eval/predictions.json --out=runs/again

First every image is predicted and written to files in the official formats, then the files are scored: the numbers of
several hosts are those of one. Writes results.json, a table, and grid.png with predictions beside the ground truth;
`--before=runs/x/before/predictions.json` adds those of the model that a training started from.

Where only the package is installed: python -m esg_jax.evaluation --config=recipes/entity_mini --workdir=runs/x
"""

if __name__ == "__main__":
    from esg_jax.allocator import keep_memory

    keep_memory()  # starts the program again, so it comes before the imports that take seconds

import logging
import sys

import jax
from absl import app, flags
from ml_collections import config_flags

from esg_jax.evaluation.main import run
from esg_jax.evaluation.tasks import task_from_dict
from esg_jax.named_configs import with_files
from esg_jax.sharding import make_mesh, parse_mesh

_CONFIG = config_flags.DEFINE_config_file("config", None, "File with get_config(), or the name of one: recipes/NAME.")
_OPTIONS = (
    flags.DEFINE_string("checkpoint", None, "Weights (.safetensors)."),
    flags.DEFINE_string("workdir", None, "Folder of a training run: its model.safetensors is evaluated."),
    flags.DEFINE_list("predictions", None, "Saved predictions to score again, without a model."),
    flags.DEFINE_string("out", None, "Folder for predictions and results (default: WORKDIR/eval)."),
    flags.DEFINE_list("before", None, "Predictions saved by an earlier evaluation: grid.png shows them, too."),
    flags.DEFINE_enum("views", None, ["1", "5"], "Whole image (1), or also its four corner crops (5)."),
    flags.DEFINE_integer("workers", 1, "Processes that score."),
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Precision of the network."),
)
_MESH = flags.DEFINE_string("mesh", None, "DATA,FSDP,MODEL devices: images over the first two, weights over the last.")
_MULTIHOST = flags.DEFINE_bool("multihost", False, "Connect to the other hosts first; --out must be a shared folder.")


def main() -> None:
    """Runs with the arguments of the command line."""
    sys.argv[:] = with_files(sys.argv, "config")
    flags.mark_flag_as_required("config")
    app.run(_main)


def _main(_):
    options = {flag.name: flag.value for flag in _OPTIONS}
    try:
        if not options["predictions"]:
            if _MULTIHOST.value:
                jax.distributed.initialize()
            options["mesh"] = (
                parse_mesh(_MESH.value) if _MESH.value else make_mesh(-1, 1, 1) if _MULTIHOST.value else None
            )
        options["views"] = options["views"] and int(options["views"])
        run(task_from_dict(_CONFIG.value.to_dict()), **options)
    except (ValueError, OSError) as error:
        logging.debug("traceback", exc_info=True)
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
