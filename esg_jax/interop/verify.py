"""Runs PyTorch's model and ours on the same input (needs the `torch` extra)."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Difference:
    """Largest difference of one output, absolute and relative to its largest magnitude."""

    output: str
    absolute: float
    relative: float


def verify_transformers(
    folder: str | Path, inputs: Mapping[str, np.ndarray], ours: Mapping[str, Any]
) -> list[Difference]:
    """Compares outputs of ours with those of transformers' model that is loaded from `folder`, in float32.

    Args:
        folder: holds config.json, which names the model, and safetensors.
        inputs: argument of their model -> array; images (B, H, W, 3) are turned to PyTorch's order.
        ours: output of their model -> what we have for it.

    Raises:
        ModuleNotFoundError: torch or transformers is not installed.
        ValueError: transformers did not find all weights in the folder, or has no such model.
    """
    import torch
    import transformers

    (name,) = json.loads((Path(folder) / "config.json").read_text())["architectures"]
    if not hasattr(transformers, name):
        raise ValueError(f"{name} is not a model of transformers, so there is nothing to compare with")
    theirs, info = getattr(transformers, name).from_pretrained(
        str(folder), local_files_only=True, output_loading_info=True, dtype=torch.float32
    )
    lost = {key: info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    if lost:
        raise ValueError(f"transformers does not take {folder} as it is: {lost}")
    tensors = {
        name: torch.from_numpy((x.transpose(0, 3, 1, 2) if x.ndim == 4 else x).copy()) for name, x in inputs.items()
    }
    with torch.inference_mode():
        expected = theirs.eval()(**tensors)
    return [compare(name, value, getattr(expected, name)) for name, value in ours.items()]


def random_views(views: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """One image's views of noise, uint8 (1, views, height, width, 3), and their sizes."""
    image = np.random.default_rng(0).integers(0, 256, (1, views, *size, 3), np.uint8)
    return image, np.broadcast_to(np.array(size, np.int32), (1, views, 2)).copy()


def run_views(model: nnx.Module, image: np.ndarray, size: np.ndarray):
    """What a model of views predicts, compiled."""
    return nnx.jit(lambda model, image, size: model(image, size, all_predictions=False))(model, image, size)


def compare(name: str, ours, theirs) -> Difference:
    """The difference of an array of ours and a tensor of PyTorch's.

    Raises:
        ValueError: their shapes differ.
    """
    ours, theirs = np.asarray(ours, np.float64), theirs.double().numpy()
    if ours.shape != theirs.shape:
        raise ValueError(f"{name}: our shape is {ours.shape}, theirs {theirs.shape}")
    absolute = np.abs(ours - theirs).max()
    return Difference(name, float(absolute), float(absolute / np.abs(theirs).max()))
