"""Mask2Former for entities (one class, one view), the baseline of the paper; argument: swin_t, swin_l or r50.

    python train.py --config=configs/mask2former_entity.py:swin_t --workdir=runs/m2f_entity_swin_t

Batch 16, 103,125 steps, large-scale jitter at 1024 pixels, as the reference (for r50 it has no config; the same
settings are used). Hardware: not measured here.
Expected AP^e low / high resolution (reference repository's README, not reproduced here): swin_t 38.8 / 40.7,
swin_l 44.4 / 46.2.
"""

from configs import common
from esg_jax.train.config import RunConfig
from esg_jax.train.loop import LoopConfig


def get_config(size: str = "swin_t"):
    return common.as_config(
        RunConfig(
            model=common.model_of_size(size).without_views(),
            data=common.lsj_data(common.ENTITYSEG, batch_size=16),
            loop=LoopConfig(total_steps=103_125),
            remat=size == "swin_l",
        )
    )
