"""Masks of an image: one set, one background value, one run-length code, mask files in and out.

Plain numpy; nothing here knows models, data sets or metrics.
"""

from esg_jax.masks.mask_set import BACKGROUND, MaskSet, NoMasksError, disjoint_masks
from esg_jax.masks.read import mask_file_of, read_masks
from esg_jax.masks.rle import MaskError

__all__ = ["BACKGROUND", "MaskError", "MaskSet", "NoMasksError", "disjoint_masks", "mask_file_of", "read_masks"]
