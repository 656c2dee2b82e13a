"""Pictures of predictions: plain numpy in, RGB arrays out."""

from esg_jax.viz.grid import GridRow, image_grid, label_map_of, prediction_grid
from esg_jax.viz.overlay import overlay

__all__ = ["GridRow", "image_grid", "label_map_of", "overlay", "prediction_grid"]
