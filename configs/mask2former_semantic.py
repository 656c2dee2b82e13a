"""Mask2Former for semantic segmentation of EntitySeg's 150 classes; argument: swin_t, swin_l or r50.

    python train.py --config=configs/mask2former_semantic.py:swin_t --workdir=runs/m2f_semantic_swin_t

Batch 16, 34,375 steps, 512-pixel crops, Swin-L with window 12 and 200 queries, as the reference's class-aware configs.
Difference: scales come from large-scale jitter, where the reference draws the shortest edge from 256 to 1024.
Hardware: not measured here. The reference publishes no score to expect.
"""

from configs import common
from esg_jax.train.config import RunConfig
from esg_jax.train.loop import LoopConfig


def get_config(size: str = "swin_t"):
    model = common.model_of_size(size, window_size=12)
    return common.as_config(
        RunConfig(
            model=model.without_views(num_classes=150, num_queries=200 if size == "swin_l" else 100),
            data=common.lsj_data(
                common.ENTITYSEG_SEMANTIC, lsj_size=512, lsj_scales=(0.5, 2.0), class_agnostic=False, batch_size=16
            ),
            loop=LoopConfig(total_steps=34_375),
            remat=size == "swin_l",
        )
    )
