"""The quickstart with another way of embedding entities (ESG, Tables 19-20); argument: VARIANT, or VARIANT,FOLDER.

    python train.py --config=configs/gella_variants.py:binary_pool,../shared/realdata --workdir=runs/binary_pool

VARIANT: colormap (the quickstart itself, to compare with), binary_pool, roi_align, mask_ca_add or mask_ca_mul. Data,
language model, losses and schedule are the quickstart's, and so is what it is good for; the sizes here are small ones,
`esg_jax.models.entity_variants` has defaults for large models. `--config.model.entities.pooling=cls`, `...values` and
`...blocks.num_blocks` walk through Table 19. Needs what the quickstart needs.
"""

import dataclasses

from configs import common, gella_quickstart
from esg_jax.models.entity_variants import VARIANTS, BinaryPoolConfig, EntityBlocksConfig
from esg_jax.train.config import RunConfig


def get_config(argument: str = "binary_pool"):
    variant, *root = argument.split(",", maxsplit=1)
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; choose one of {', '.join(VARIANTS)}")
    run = RunConfig.from_dict(gella_quickstart.get_config(*root).to_dict())
    if variant == "colormap":
        return common.as_config(run)
    entities = dataclasses.replace(
        VARIANTS[variant],
        num_queries=run.model.num_queries,
        blocks=EntityBlocksConfig(dim=128, num_heads=4, ffn_dim=512, num_blocks=3),
    )
    if isinstance(entities, BinaryPoolConfig):  # 40 passes per image: small ones for two CPU cores
        entities = dataclasses.replace(entities, mask_size=96)
    model = dataclasses.replace(run.model, entities=entities)
    multipliers = (*run.optim.multipliers, (r"mask_encoder\.", 0.3))
    return common.as_config(
        dataclasses.replace(run, model=model, optim=dataclasses.replace(run.optim, multipliers=multipliers))
    )
