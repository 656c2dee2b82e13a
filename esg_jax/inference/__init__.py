"""From images to entity masks."""

from esg_jax.inference.entities.predictions import EntityPrediction, InstancePrediction, PanopticPrediction
from esg_jax.inference.entities.predictor import Predictor
from esg_jax.inference.entities.scores import ScoreMode

__all__ = ["EntityPrediction", "InstancePrediction", "PanopticPrediction", "Predictor", "ScoreMode"]
