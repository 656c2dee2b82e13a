"""What the configs share."""

import dataclasses
import typing
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FieldReference

from esg_jax.input.pipeline import DataConfig
from esg_jax.input.readers import read_json
from esg_jax.models.cropformer import CropFormerConfig
from esg_jax.train.config import RunConfig

# EntitySeg laid out as its authors distribute it; elsewhere: --config.data.sources.entityseg.annotations=...
_ROOT = "datasets/entityseg"
_LABELS = f"{_ROOT}/annotations"
ENTITYSEG = {
    "entityseg": {
        "reader": "coco_instances",
        "annotations": f"{_LABELS}/entity_segmentation/entityv2_010203_entity_train_lr.json",
        "images": f"{_ROOT}/images_lr",
    }
}
ENTITYSEG_INSTANCES = {
    "entityseg": {
        "reader": "coco_instances",
        "annotations": f"{_LABELS}/instance_segmentation/entityv2_01_instances_train.json",
        "images": f"{_ROOT}/images/entity_01_11580",
    }
}
ENTITYSEG_PANOPTIC = {
    "entityseg": {
        "reader": "coco_panoptic",
        "annotations": f"{_LABELS}/panoptic_segmentation/entityv2_01_panoptic_train.json",
        "images": f"{_ROOT}/images/entity_01_11580",
        "masks": f"{_LABELS}/panoptic_segmentation/panoptic_maps_train",
    }
}
# The semantic maps fit the low-resolution images, not the originals.
ENTITYSEG_SEMANTIC = {
    "entityseg": {
        "reader": "semantic_maps",
        "annotations": f"{_LABELS}/semantic_segmentation/train.txt",
        "images": f"{_ROOT}/images_lr/entity_01_11580",
        "masks": f"{_LABELS}/semantic_segmentation/semantic_maps_train",
    }
}


def scenes(folder: str) -> dict[str, Any]:
    """Procedural scenes that `python -m data.scenes --out FOLDER` rendered."""
    return {"scenes": {"annotations": f"{folder}/annotations.json", "images": folder}}


def mix(folder: str) -> dict[str, Any]:
    """Sources of a mix that `python -m data.demo_mix --out FOLDER` put together.

    Raises:
        FileNotFoundError: there is none.
        ValueError: `mix.json` is malformed.
    """
    file = Path(folder, "mix.json")
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found; make it by: python -m data.demo_mix --out {folder}")
    sources = read_json(str(file)).get("sources")
    if not isinstance(sources, dict):
        raise ValueError(f"{file} has no dictionary 'sources'")
    for source in sources.values():
        source.pop("licence")
        source |= {key: str(Path(folder, source[key])) for key in ("annotations", "images")}
    return sources


def as_config(run: RunConfig) -> ConfigDict:
    """The form that `--config.x.y=z` overrides; unknown names are refused."""
    return ConfigDict(_with_optional(run, run.as_dict()))


def _with_optional(config: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Lets fields that may be None be overridden by None and from None; a plain field keeps the type of its value."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        name, member = field.name, getattr(config, field.name)
        if dataclasses.is_dataclass(member):
            values[name] = ConfigDict(_with_optional(member, values[name]))
        if type(None) in typing.get_args(hints[name]):
            values[name] = FieldReference(values[name], field_type=object)
    return values


def crop_data(sources: dict[str, Any] = ENTITYSEG, **changes) -> DataConfig:
    """The reference's crop loader: whole image and one corner crop, shortest edge 640 to 800."""
    return dataclasses.replace(DataConfig(sources=sources, mapper="entity_crop"), **changes)


def lsj_data(sources: dict[str, Any], **changes) -> DataConfig:
    """Large-scale jitter, 1024 pixels, as the Mask2Former configs use."""
    return dataclasses.replace(DataConfig(sources=sources, mapper="lsj"), **changes)


def model_of_size(size: str, *, window_size: int = 7) -> CropFormerConfig:
    """swin_t, swin_l (with this window) or r50."""
    sizes = {
        "swin_t": CropFormerConfig.swin_tiny,
        "swin_l": lambda: CropFormerConfig.swin_large(window_size),
        "r50": CropFormerConfig.resnet50,
    }
    if size not in sizes:
        raise ValueError(f"unknown model size {size!r}; choose one of {', '.join(sizes)}")
    return sizes[size]()
