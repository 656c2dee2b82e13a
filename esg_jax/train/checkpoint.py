"""Saving and restoring runs: everything that touches Orbax.

Where the weights of a run come from, first match wins (`train.py` follows this order):

1. the newest checkpoint in the workdir: the run goes on exactly where it stopped, same batches, same losses;
2. `config.init_from`: weights of another run (its workdir), a .safetensors file or a PyTorch checkpoint; a new run;
3. `config.backbone_weights`: a PyTorch classifier's weights below `backbone.`, the rest random;
4. random initialisation from `config.seed`.

Resuming comes first because a restarted job has the same command line as the one that was stopped.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from esg_jax.train.state import TrainState

log = logging.getLogger(__name__)

STATE, DATA = "state", "data"
FOLDER = "checkpoints"


class CheckpointMismatchError(ValueError):
    """The checkpoint in the workdir was written by a run with another configuration."""


class Checkpointer:
    """Keeps the last few checkpoints of a run below `workdir/checkpoints`.

    A checkpoint holds the state, the position of the input iterator and the run's configuration, written together: a
    folder appears under its step number only when all of it is on disk.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        config: Mapping[str, Any],
        keep: int = 2,
        complete: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    ):
        """Opens or creates the folder.

        Args:
            workdir: folder of the run, shared by all hosts.
            config: nested plain values; stored, and compared when the run resumes.
            keep: number of checkpoints kept.
            complete: gives a stored configuration the defaults of fields that are younger than it.
        """
        self._complete = complete
        self._config = _plain(config)
        self._manager = ocp.training.Checkpointer(
            Path(workdir).absolute() / FOLDER,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=jax.process_index() == 0,
        )

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint."""
        latest = self._manager.latest
        return None if latest is None else latest.step

    def save(self, state: TrainState, batches: Any) -> None:
        """Starts writing in the background; values are copied before this returns.

        Args:
            state: to be saved under its own step number.
            batches: the Grain iterator that delivered exactly the batches of the steps done.
        """
        step = int(state.step)
        if step == self.latest_step:
            return
        self._manager.save_checkpointables_async(
            step, {STATE: _as_dict(state), DATA: batches}, force=True, custom_metadata={"config": self._config}
        )

    def restore(self, abstract: TrainState, batches: Any) -> TrainState:
        """The newest checkpoint, in the sharding of `abstract`; sets `batches` to the position saved with it.

        Raises:
            FileNotFoundError: there is no checkpoint.
            CheckpointMismatchError: the model or the optimiser's averages differ from those of the checkpoint.
        """
        latest = self._manager.latest
        if latest is None:
            raise FileNotFoundError(f"no checkpoint in {self._manager.directory}")
        self._check_config(latest.step)
        loaded = self._manager.load_checkpointables(latest.step, {STATE: _as_dict(abstract), DATA: batches})
        return TrainState(**loaded[STATE])

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.close()

    def _check_config(self, step: int) -> None:
        stored = (self._manager.metadata(step).custom_metadata or {}).get("config", {})
        changes = differences(_plain(self._complete(stored)), self._config)
        fatal = [line for key, line in changes.items() if key.split(".")[0] in ("model", "ema_decay")]
        if fatal:
            raise CheckpointMismatchError(
                f"{self._manager.directory} holds a checkpoint (step {step}) of another configuration:\n  "
                + "\n  ".join(fatal)
                + "\nUse another --workdir, or --config.init_from to start a new run from its weights."
            )
        for line in changes.values():
            log.warning("resuming with a changed configuration: %s", line)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """As it is when read back: tuples become lists."""
    return json.loads(json.dumps(config))


def differences(stored: Mapping[str, Any], current: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted key -> readable line, for every key whose value differs between two nested dictionaries."""
    out: dict[str, str] = {}
    for key in sorted(set(stored) | set(current)):
        path = f"{prefix}{key}"
        old, new = stored.get(key, "<absent>"), current.get(key, "<absent>")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            out.update(differences(old, new, f"{path}."))
        elif old != new:
            out[path] = f"{path}: checkpoint has {old!r}, this run {new!r}"
    return out


def load_run_weights(workdir: str | Path, *, average: bool = True) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Weights and configuration of the newest checkpoint of a run, on the host; optimiser moments are not read.

    Args:
        workdir: folder of the run.
        average: take the moving average where the run keeps one.

    Raises:
        FileNotFoundError: the folder holds no checkpoint.
    """
    folder = Path(workdir).absolute() / FOLDER
    if not folder.is_dir():
        raise FileNotFoundError(f"{workdir} holds no {FOLDER!r} folder: it is not the workdir of a run")
    with ocp.training.Checkpointer(folder) as manager:
        latest = manager.latest
        if latest is None:
            raise FileNotFoundError(f"no complete checkpoint in {folder}")
        info = manager.metadata(latest.step).custom_metadata or {}
        saved = manager.checkpointables_metadata(latest.step).metadata[STATE]
        wanted = {"params", "constants", "ema"}
        abstract = {
            key: jax.tree.map(
                lambda leaf, keep=key in wanted: np.zeros(leaf.shape, leaf.dtype) if keep else ocp.PLACEHOLDER, value
            )
            for key, value in saved.items()
        }
        state = manager.load_checkpointables(latest.step, {STATE: abstract})[STATE]
    trained = state["ema"] if average and state["ema"] is not None else state["params"]
    return {**trained, **state["constants"]}, {"step": latest.step, **info}


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
