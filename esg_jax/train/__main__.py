"""Trains CropFormer, Mask2Former or GELLA.

    python train.py --config=configs/tiny.py --workdir=/tmp/tiny
    python train.py --config=configs/cropformer_swin_t.py --workdir=runs/swin_t --config.data.batch_size=8
    python train.py --config=configs/entity_mini.py --workdir=runs/entity_mini \\
        --eval=configs/recipes/entity_mini.py --config.loop.eval_every=200

Where only the package is installed: python -m esg_jax.train --config=tiny --workdir=/tmp/tiny

Every field of a config can be overridden with --config.NAME=VALUE, and of an evaluation recipe with --eval.NAME=VALUE.
Run the same command again to go on after an interruption: the run continues exactly where its last checkpoint left it.
Ctrl-C or SIGTERM saves first.
"""

if __name__ == "__main__":
    from esg_jax.allocator import keep_memory

    keep_memory()  # starts the program again, so it comes before the imports that take seconds

import logging
import sys
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import config_flags

from esg_jax.evaluation.tasks import task_from_dict
from esg_jax.named_configs import with_files
from esg_jax.train.config import RunConfig
from esg_jax.train.loop import NonFiniteLossError
from esg_jax.train.main import run, start_logging, use_compilation_cache

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "File with get_config(), or the name of one of configs/.", lock_config=True
)
_EVAL = config_flags.DEFINE_config_file(
    "eval", None, "Recipe of configs/recipes: what is evaluated every config.loop.eval_every steps.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics.jsonl, model.safetensors.")
_MULTIHOST = flags.DEFINE_bool("multihost", False, "Connect to the other hosts of a pod or cluster before anything.")

log = logging.getLogger("esg_jax")


def main() -> None:
    """Runs with the arguments of the command line."""
    sys.argv[:] = with_files(sys.argv, "config", "eval")
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(_main)


def _main(_):
    if _MULTIHOST.value:
        jax.distributed.initialize()  # before anything asks for devices
    start_logging()
    use_compilation_cache()
    try:
        recipe = task_from_dict(_EVAL.value.to_dict(), "eval") if _EVAL.value is not None else None
        run(RunConfig.from_dict(_CONFIG.value.to_dict()), Path(_WORKDIR.value), recipe)
    except (ValueError, OSError, ImportError, NonFiniteLossError) as error:
        # Configuration, file, missing package or divergence: the message says what to do, a traceback would bury it.
        log.debug("traceback", exc_info=True)
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
