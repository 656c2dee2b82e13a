"""Pictures and label maps of predictions."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from esg_jax.inference.entities.predictions import EntityPrediction
from esg_jax.masks import write
from esg_jax.viz.overlay import overlay
from esg_jax.viz.palette import assign_colors, palette


def write_label_map(path: str | Path, prediction: EntityPrediction) -> None:
    """`masks.write.write_label_map` with the colours of `write_overlay`."""
    count = len(prediction)
    write.write_label_map(path, prediction, palette()[assign_colors(prediction.label_map, count)])


def write_overlay(
    path: str | Path,
    image_hw3: np.ndarray,
    prediction: EntityPrediction,
    names: Sequence[str] | None = None,
    *,
    max_side: int = 1600,
) -> None:
    """PNG of the photograph with tinted, outlined entities, tagged with class (when `names` are given) and score."""
    tags = [f"{score:.2f}" for score in prediction.scores]
    if names is not None:
        tags = [f"{names[label]} {tag}" for label, tag in zip(prediction.labels, tags, strict=True)]
    Image.fromarray(overlay(image_hw3, prediction.label_map, tags, max_side=max_side)).save(path)
