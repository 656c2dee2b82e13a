"""Checkpoint families: a file each that knows names, sizes and files of one, and an entry in `FAMILIES`."""

from collections.abc import Iterable
from typing import Any

from esg_jax.interop.convert import ConversionError
from esg_jax.interop.families import clip, cropformer, gella, llama, llava, llava_original, mask2former
from esg_jax.interop.families.backbones import BACKBONES
from esg_jax.interop.families.family import Family, Format

# The first one that fits a checkpoint is taken; of those that write a model the first is the default. A package that
# brings a family of its own adds an entry.
FAMILIES: list[Family] = [
    cropformer.FAMILY,
    mask2former.FAMILY,
    gella.FAMILY,
    llava.FAMILY,
    llava_original.FAMILY,
    llama.FAMILY,
    clip.FAMILY,
    clip.VISION,
    clip.TEXT,
]


def detect(names: Iterable[str]) -> tuple[Family, Format]:
    """What a checkpoint with these names is: of a whole model, or else of a backbone.

    Raises:
        ConversionError: none that is known.
    """
    names = list(names)
    known = [(family, form) for family in (*FAMILIES, *BACKBONES) for form in family.formats()]
    for family, form in known:
        if form.fits(names):
            return family, form
    raise ConversionError(
        f"unknown checkpoint: its first names are {', '.join(names[:5])}; known formats are "
        + ", ".join(form.name for _, form in known)
    )


def written_family(config: Any, written_as: str | None = None) -> Family:
    """The family that a model is written as.

    Args:
        config: the model's configuration.
        written_as: which one, where there are several; by default the first.

    Raises:
        ConversionError: no such family for this model.
    """
    fitting = {family.written_as: family for family in FAMILIES if family.write and family.config is type(config)}
    name = written_as or next(iter(fitting), None)
    if name not in fitting:
        choice = f"choose {', '.join(fitting)}" if fitting else "it is never written for PyTorch"
        raise ConversionError(f"no format {name!r} for a {type(config).__name__}; {choice}")
    return fitting[name]
