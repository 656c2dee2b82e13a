"""What the configs share."""

import dataclasses

from ml_collections import ConfigDict

from esg_jax.input.pipeline import DataConfig
from esg_jax.train.config import RunConfig

# Prepared as data/README.md describes; another place: --config.data.sources.entityseg.annotations=...
ENTITYSEG = {
    "entityseg": {
        "reader": "coco_instances",
        "annotations": "datasets/entityseg/annotations/entity_segmentation/entityv2_010203_entity_train_lr.json",
        "images": "datasets/entityseg/images_lr",
    }
}


def as_config(run: RunConfig) -> ConfigDict:
    """The form that `--config.x.y=z` overrides; unknown names are refused."""
    return ConfigDict(run.as_dict())


def crop_data(**changes) -> DataConfig:
    """The reference's crop loader on EntitySeg: whole image and one corner crop, shortest edge 640 to 800."""
    return dataclasses.replace(DataConfig(sources=ENTITYSEG, mapper="entity_crop"), **changes)


def lsj_data(sources: dict, **changes) -> DataConfig:
    """Large-scale jitter, 1024 pixels, as the Mask2Former configs use."""
    return dataclasses.replace(DataConfig(sources=sources, mapper="lsj"), **changes)
