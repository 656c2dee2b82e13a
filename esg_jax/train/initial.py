"""Weights a run starts from: those of another run, or of a file, checked against the model."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from esg_jax.train.checkpoint import load_run_weights

log = logging.getLogger(__name__)


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
