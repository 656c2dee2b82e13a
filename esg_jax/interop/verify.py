"""Runs PyTorch's model and ours on the same input (needs the `torch` extra)."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from esg_jax.models.cropformer import CropFormer

_SIZE = 256


@dataclasses.dataclass(frozen=True)
class Difference:
    """Largest difference of one output, absolute and relative to its largest magnitude."""

    output: str
    absolute: float
    relative: float


def verify_transformers(
    folder: str | Path, model: CropFormer, size: tuple[int, int] = (_SIZE, _SIZE)
) -> list[Difference]:
    """Compares `model` with transformers' Mask2Former loaded from `folder`, in float32 on a random image.

    Args:
        folder: holds config.json and model.safetensors.
        model: ours, without views.
        size: height and width of the image. Below the size at which every Swin stage holds a whole window
            transformers shrinks the windows and rightly differs.

    Raises:
        ModuleNotFoundError: torch or transformers is not installed.
        ValueError: transformers did not find all weights in the folder.
    """
    import torch
    from transformers import Mask2FormerForUniversalSegmentation

    theirs, info = Mask2FormerForUniversalSegmentation.from_pretrained(
        str(folder), local_files_only=True, output_loading_info=True, dtype=torch.float32
    )
    lost = {key: info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    if lost:
        raise ValueError(f"transformers does not take {folder} as it is: {lost}")
    height, width = size
    image = np.random.default_rng(0).integers(0, 256, (1, 1, height, width, 3), np.uint8)
    extent = jnp.array([[[height, width]]], jnp.int32)
    output = nnx.jit(lambda model, image, size: model(image, size, all_predictions=False))(model, image, extent)
    normalized = np.asarray(model.normalize(jnp.asarray(image), extent))[0]
    with torch.inference_mode():
        expected = theirs.eval()(pixel_values=torch.from_numpy(normalized.transpose(0, 3, 1, 2).copy()))
    return [
        _difference("class logits", output.image.logits[-1], expected.class_queries_logits),
        _difference("mask logits", output.image_mask_logits()[:, 0], expected.masks_queries_logits),
    ]


def _difference(name: str, ours, theirs) -> Difference:
    ours, theirs = np.asarray(ours, np.float64), theirs.double().numpy()
    if ours.shape != theirs.shape:
        raise ValueError(f"{name}: our shape is {ours.shape}, theirs {theirs.shape}")
    absolute = np.abs(ours - theirs).max()
    return Difference(name, float(absolute), float(absolute / np.abs(theirs).max()))
