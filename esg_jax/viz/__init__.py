"""Pictures of predictions: plain numpy in, RGB arrays out."""

from esg_jax.viz.grid import GridRow, image_grid, prediction_grid
from esg_jax.viz.overlay import overlay

__all__ = ["GridRow", "image_grid", "overlay", "prediction_grid"]
