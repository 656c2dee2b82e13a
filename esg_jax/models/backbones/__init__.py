"""Backbones: images to maps at strides 4, 8, 16 and 32. One is a file in this folder and an entry in `BACKBONES`."""

from collections.abc import Callable
from typing import Annotated, Any

from flax import nnx

from esg_jax.models.backbones.mobilenet_v2 import MobileNetV2, MobileNetV2Config
from esg_jax.models.backbones.resnet import ResNet, ResNetConfig
from esg_jax.models.backbones.swin import Swin, SwinConfig

# Class of the configuration -> the module. A package that brings a backbone of its own adds an entry.
BACKBONES: dict[type, Callable[..., nnx.Module]] = {
    SwinConfig: Swin,
    ResNetConfig: ResNet,
    MobileNetV2Config: MobileNetV2,
}


def backbone_configs() -> tuple[type, ...]:
    """The classes that a field of type `BackboneConfig` takes."""
    return tuple(BACKBONES)


# Type of a configuration's field that holds the configuration of any backbone (see `esg_jax.config.from_dict`).
BackboneConfig = Annotated[Any, backbone_configs]


def make_backbone(config: BackboneConfig, **kwargs) -> nnx.Module:
    """The backbone that a configuration describes.

    Args:
        config: of a class in `BACKBONES`.
        kwargs: `rngs`, `dtype`, `param_dtype`, and `remat` to recompute blocks in the backward pass.

    Returns:
        A module with `out_channels`, the channels of its four maps. It maps normalised images (B, H, W, 3), whose sides
        are multiples of 32, and a `drop_path_key` to the maps (B, H/s, W/s, C) at the strides s.

    Raises:
        ValueError: no backbone has such a configuration.
    """
    if type(config) not in BACKBONES:
        known = ", ".join(cls.__name__ for cls in BACKBONES)
        raise ValueError(f"there is no backbone for a {type(config).__name__}; choose one of {known}")
    return BACKBONES[type(config)](config, **kwargs)
