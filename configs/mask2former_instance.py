"""Mask2Former for instance segmentation of EntitySeg's 206 thing classes; argument: swin_t, swin_l or r50.

    python train.py --config=configs/mask2former_instance.py:swin_t --workdir=runs/m2f_instance_swin_t

Batch 16, 34,375 steps, Swin-L with window 12, as the reference's class-aware configs. Only the first image folder of
EntitySeg (11,580 images) has class labels. Hardware: not measured here. The reference publishes no score to expect.
"""

from configs import common
from esg_jax.train.config import RunConfig
from esg_jax.train.loop import LoopConfig


def get_config(size: str = "swin_t"):
    return common.as_config(
        RunConfig(
            model=common.model_of_size(size, window_size=12).without_views(num_classes=206),
            data=common.lsj_data(common.ENTITYSEG_INSTANCES, class_agnostic=False, batch_size=16),
            loop=LoopConfig(total_steps=34_375),
            remat=size == "swin_l",
        )
    )
