"""CropFormer, Swin-L (window 7), on EntitySeg (low-resolution copy, 33k images).

    python train.py --config=configs/cropformer_swin_l.py --workdir=runs/cropformer_swin_l \\
        --config.init_from=m2f_entity_swin_l.safetensors

Batch 8, 206,250 steps, as the reference. It starts from a Mask2Former that was trained on COCO entities
(`esg convert` makes the .safetensors file); the association module starts at random.
Hardware: not measured. `python benchmarks/tpu_plan.py train cropformer_swin_l --topology=v5e:4x4 --batch=16` compiles
the step for a TPU slice without one and prints its memory per chip, see docs/tpu.md.
Expected AP^e (reference repository's README, not reproduced here): 45.8 low resolution, 48.2 high resolution.
"""

from configs import common
from esg_jax.models.cropformer import CropFormerConfig
from esg_jax.train.config import RunConfig
from esg_jax.train.loop import LoopConfig


def get_config():
    return common.as_config(
        RunConfig(
            model=CropFormerConfig.swin_large(),
            data=common.crop_data(batch_size=8),
            loop=LoopConfig(total_steps=206_250),
            remat=True,
        )
    )
