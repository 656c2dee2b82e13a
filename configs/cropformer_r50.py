"""CropFormer, ResNet-50 with frozen batch norm, on EntitySeg (low-resolution copy, 33k images).

    python train.py --config=configs/cropformer_r50.py --workdir=runs/cropformer_r50 \\
        --config.backbone_weights=resnet50.safetensors

The reference has no such config: this is the Swin-T one with another backbone, so no score is expected. Give ImageNet
weights of the backbone (converted by `esg convert`); from random ones, frozen batch norm does not train well.
"""

from configs import common
from esg_jax.models.cropformer import CropFormerConfig
from esg_jax.train.config import RunConfig
from esg_jax.train.loop import LoopConfig


def get_config():
    return common.as_config(
        RunConfig(
            model=CropFormerConfig.resnet50(),
            data=common.crop_data(batch_size=16),
            loop=LoopConfig(total_steps=34_375),
        )
    )
