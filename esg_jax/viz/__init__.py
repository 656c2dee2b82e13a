"""Pictures of predictions: plain numpy in, RGB arrays out."""

from esg_jax.viz.grid import GridRow, comparison_grid, image_grid, prediction_grid
from esg_jax.viz.overlay import overlay
from esg_jax.viz.phrases import phrase_picture

__all__ = ["GridRow", "comparison_grid", "image_grid", "overlay", "phrase_picture", "prediction_grid"]
