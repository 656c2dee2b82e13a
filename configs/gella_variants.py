"""The quickstart with another way of embedding entities (ESG, Tables 19-20); argument: VARIANT, or VARIANT,FOLDER.

    python train.py --config=configs/gella_variants.py:binary_pool,../shared/realdata --workdir=runs/binary_pool

VARIANT: colormap (GELLA's own; start it from `gella_reconstruction.py:entity_mini`, whose image size, side of the map
and colours it has), binary_pool, roi_align, mask_ca_add (the quickstart itself, to compare with) or mask_ca_mul. Data,
language model, losses and schedule are the quickstart's, and so is what it is good for; the sizes here are small,
`esg_jax.models.gella.entity_variants` has defaults for large models. `--config.model.entities.pooling=cls`, `...values`
and `...blocks.num_blocks` walk through Table 19. Needs what the quickstart needs.
"""

import dataclasses

from configs import common, gella_quickstart, gella_reconstruction
from esg_jax.models.gella.entity_variants import VARIANTS, BinaryPoolConfig
from esg_jax.train.config import RunConfig


def get_config(argument: str = "binary_pool"):
    variant, *root = argument.split(",", maxsplit=1)
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; choose one of {', '.join(VARIANTS)}")
    run = RunConfig.from_dict(gella_quickstart.get_config(*root).to_dict())
    if variant == "colormap":  # as it comes out of gella_reconstruction.py
        first = RunConfig.from_dict(gella_reconstruction.get_config().to_dict()).model
        same = ("entities", "colormap", "image_size", "vision_stride", "token_pooling")
        model = dataclasses.replace(run.model, **{name: getattr(first, name) for name in same})
        sides = {"image_size": model.image_size, "map_size": model.colormap.size}
        data = dataclasses.replace(run.data, num_image_tokens=model.num_image_tokens, **sides)
        return common.as_config(dataclasses.replace(run, model=model, data=data))
    blocks = gella_quickstart.BLOCKS
    entities = dataclasses.replace(VARIANTS[variant], num_queries=run.model.num_queries, blocks=blocks)
    if isinstance(entities, BinaryPoolConfig):  # 40 passes per image: small ones for two CPU cores
        entities = dataclasses.replace(entities, mask_size=96)
    return common.as_config(dataclasses.replace(run, model=dataclasses.replace(run.model, entities=entities)))
