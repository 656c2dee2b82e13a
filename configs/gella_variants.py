"""The quickstart with another way of embedding entities (ESG, Tables 19-20); argument: VARIANT, or VARIANT,FOLDER.

    python train.py --config=configs/gella_variants.py:binary_pool,../shared/realdata --workdir=runs/binary_pool

VARIANT: colormap (GELLA's own; start it from `gella_reconstruction.py`, whose image size it has), binary_pool,
roi_align, mask_ca_add (the quickstart itself, to compare with) or mask_ca_mul. Data, language model, losses and
schedule are the quickstart's, and so is what it is good for; the sizes here are small, `esg_jax.models.entity_variants`
has defaults for large models. `--config.model.entities.pooling=cls`, `...values` and `...blocks.num_blocks` walk
through Table 19. Needs what the quickstart needs.
"""

import dataclasses

from configs import common, gella_quickstart
from configs.gella_reconstruction import small_entity_encoder
from esg_jax.models.entity_variants import VARIANTS, BinaryPoolConfig
from esg_jax.train.config import RunConfig


def get_config(argument: str = "binary_pool"):
    variant, *root = argument.split(",", maxsplit=1)
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; choose one of {', '.join(VARIANTS)}")
    run = RunConfig.from_dict(gella_quickstart.get_config(*root).to_dict())
    if variant == "colormap":  # as it comes out of gella_reconstruction.py
        vision = {"image_size": 224, "vision_stride": 32, "token_pooling": 1}
        model = dataclasses.replace(run.model, entities=small_entity_encoder(), **vision)
        data = dataclasses.replace(run.data, image_size=model.image_size, num_image_tokens=model.num_image_tokens)
        return common.as_config(dataclasses.replace(run, model=model, data=data))
    blocks = gella_quickstart.BLOCKS
    entities = dataclasses.replace(VARIANTS[variant], num_queries=run.model.num_queries, blocks=blocks)
    if isinstance(entities, BinaryPoolConfig):  # 40 passes per image: small ones for two CPU cores
        entities = dataclasses.replace(entities, mask_size=96)
    return common.as_config(dataclasses.replace(run, model=dataclasses.replace(run.model, entities=entities)))
