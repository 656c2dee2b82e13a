"""Confidence of an entity: how the class score and the mask combine."""

import enum

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class ScoreMode(enum.StrEnum):
    """How confident a prediction is.

    REFERENCE: class score x mean of sigmoid(p) over the mask, p being a probability already. The published numbers
        were computed so; the second factor lies in 0.62..0.73, and no score exceeds 0.731.
    QUALITY: class score x mean of p over the mask.
    ENTITYNESS: the class score alone, as the paper describes it (ESG, section 4.3); 0 for an empty mask.
    """

    REFERENCE = "reference"
    QUALITY = "quality"
    ENTITYNESS = "entityness"


def pixel_quality(probability: Float[Array, "..."], mode: ScoreMode) -> Float[Array, "..."]:
    """What a pixel of the mask contributes to the mask's quality."""
    return jax.nn.sigmoid(probability) if mode == ScoreMode.REFERENCE else probability


def entity_scores(
    class_score: Float[Array, "... q"], quality_sum: Float[Array, "... q"], area: Int[Array, "... q"], mode: ScoreMode
) -> Float[Array, "... q"]:
    """Class scores and sums of `pixel_quality` over the masks to confidences; empty masks get 0."""
    if mode == ScoreMode.ENTITYNESS:
        return jnp.where(area > 0, class_score, 0.0)
    return class_score * quality_sum / (area + 1e-6)
