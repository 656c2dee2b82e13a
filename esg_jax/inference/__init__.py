"""From images to entity masks."""

from esg_jax.inference.predictor import Predictor
from esg_jax.inference.scores import ScoreMode
from esg_jax.inference.types import EntityPrediction, InstancePrediction, PanopticPrediction

__all__ = ["EntityPrediction", "InstancePrediction", "PanopticPrediction", "Predictor", "ScoreMode"]
