"""A training run from its configuration to its weights, evaluated on the way: what `train.py` calls."""

import contextlib
import logging
import os
import sys
import time
from functools import partial
from pathlib import Path

import jax
from absl import logging as absl_logging
from jax.experimental import multihost_utils

from esg_jax.evaluation import main as evaluation
from esg_jax.evaluation.report import format_value
from esg_jax.evaluation.tasks.task import EvalTask
from esg_jax.inference.bundle import Bundle
from esg_jax.train.checkpoint import Checkpointer
from esg_jax.train.config import RunConfig, model_def
from esg_jax.train.initial import initial_weights
from esg_jax.train.logging import MetricWriter, duration
from esg_jax.train.loop import Hook, fit
from esg_jax.train.state import TrainState
from esg_jax.train.step import TrainStep
from esg_jax.weights import save_weights

log = logging.getLogger("esg_jax")


def run(config: RunConfig, workdir: Path, recipe: EvalTask | None = None) -> None:
    """One training run, or the rest of one."""
    check_recipe(config, recipe)

    # Model and mesh. Nothing is allocated before the sharding of every array is known.
    step = config.train_step()
    count = sum(leaf.size for leaf in step.model.params.values())
    log.info("%.2f M parameters on mesh %s, %s", count / 1e6, dict(step.mesh.shape), config.precision)

    with contextlib.ExitStack() as stack:
        # Data. Every process reads its own part of each batch.
        hosts = jax.process_index(), jax.process_count()
        batches = stack.enter_context(contextlib.closing(config.system.batches(config, *hosts)))

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
        facts = config.system.facts(config, step.model.params)
        left_out = config.system.left_out(config, step.model.params)
        save_weights(path, model, {"steps": int(state.step), "config": config.as_dict(), **facts}, leave_out=left_out)
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

    facts = config.system.facts(config, state.params)
    return Bundle(f"step {int(state.step)}", load, config.model, facts)


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
