"""GELLA: the nouns of a text grounded in given entity masks."""

from esg_jax.models.gella.gella import Gella, GellaConfig

__all__ = ["Gella", "GellaConfig"]
