"""Mask2Former for panoptic segmentation of EntitySeg's 350 classes; argument: swin_t, swin_l or r50.

    python train.py --config=configs/mask2former_panoptic.py:swin_t --workdir=runs/m2f_panoptic_swin_t

Batch 16, 34,375 steps, learning rate 5e-4, Swin-L with window 12 and 200 queries, as the reference's class-aware
configs. Hardware: not measured here. The reference publishes no score to expect.
"""

from configs import common
from esg_jax.train.config import RunConfig
from esg_jax.train.loop import LoopConfig
from esg_jax.train.optim import OptimConfig


def get_config(size: str = "swin_t"):
    model = common.model_of_size(size, window_size=12)
    return common.as_config(
        RunConfig(
            model=model.without_views(num_classes=350, num_queries=200 if size == "swin_l" else 100),
            data=common.lsj_data(common.ENTITYSEG_PANOPTIC, class_agnostic=False, batch_size=16),
            optim=OptimConfig(learning_rate=5e-4),
            loop=LoopConfig(total_steps=34_375),
            remat=size == "swin_l",
        )
    )
