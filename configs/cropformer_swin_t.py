"""CropFormer, Swin-T, on EntitySeg (low-resolution copy, 33k images).

    python train.py --config=configs/cropformer_swin_t.py --workdir=runs/cropformer_swin_t \\
        --config.init_from=m2f_entity_swin_t.safetensors

Batch 16, 34,375 steps, as the reference. It starts from a Mask2Former that was trained on COCO entities
(`esg convert` makes the .safetensors file); the association module starts at random.
Hardware: not measured here; for one 24 GB GPU: --config.data.batch_size=2 --config.remat=True, and
--config.accumulate=8 with batch_size 16 for the reference's batch.
Expected AP^e (reference repository's README, not reproduced here): 40.6 low resolution, 43.0 high resolution.
"""

from configs import common
from esg_jax.models.cropformer import CropFormerConfig
from esg_jax.train.config import RunConfig
from esg_jax.train.loop import LoopConfig


def get_config():
    return common.as_config(
        RunConfig(
            model=CropFormerConfig.swin_tiny(),
            data=common.crop_data(batch_size=16),
            loop=LoopConfig(total_steps=34_375),
        )
    )
