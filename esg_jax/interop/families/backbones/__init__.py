"""Checkpoints of the backbones: a file each, and an entry in `BACKBONES`."""

from typing import Any

from esg_jax.interop.convert import ConversionError
from esg_jax.interop.families.backbones import mobilenet_v2, resnet, swin
from esg_jax.interop.families.family import BackboneFamily, Shapes
from esg_jax.interop.rules import Index

# A package that brings a backbone of its own adds an entry.
BACKBONES: list[BackboneFamily] = [swin.FAMILY, resnet.FAMILY, mobilenet_v2.FAMILY]


def backbone_family(config: type) -> BackboneFamily:
    """The checkpoints of a backbone, by the class of its configuration.

    Raises:
        ConversionError: there are no such checkpoints.
    """
    for family in BACKBONES:
        if family.config is config:
            return family
    raise ConversionError(f"there are no names for checkpoints with a {config.__name__}")


def infer_backbone(shapes: Shapes) -> Any:
    """The configuration of the backbone whose parameters have these shapes, under our names within the backbone.

    Raises:
        ConversionError: no backbone has such parameters.
    """
    for family in BACKBONES:
        rules = [rule for known in family.formats() for rule in known.table.rules]
        index = Index((template, rule) for rule in rules for template in rule.ours)
        if all(index.find(name) for name in shapes):
            return family.infer(shapes, None)
    raise ConversionError(f"no backbone has the parameters {', '.join(list(shapes)[:5])}")
