"""A small CropFormer on 171 real images with 3,085 entity masks; argument: the folder with entity_mini/ in it.

    python train.py --config=configs/entity_mini.py:../shared/realdata --workdir=runs/entity_mini

MobileNetV2 with ImageNet weights, 128 channels, 50 queries, views of at most 256 pixels: made for CPUs.
"""

from configs import common
from esg_jax.losses.cropformer import LossConfig
from esg_jax.models.cropformer import CropFormerConfig
from esg_jax.train.config import RunConfig
from esg_jax.train.loop import LoopConfig
from esg_jax.train.optim import OptimConfig


def get_config(root: str = "../shared/realdata"):
    source = {"annotations": f"{root}/entity_mini/entity_train.json", "images": root}
    return common.as_config(
        RunConfig(
            model=CropFormerConfig.mobilenet_v2(),
            data=common.crop_data(
                {"entity_mini": source},
                short_edges=(160, 168, 176, 184, 192),
                max_size=256,
                buckets=((192, 256), (256, 192)),
                max_entities=40,
                batch_size=4,
            ),
            loss=LossConfig(num_points=1024, shared_points=True),
            optim=OptimConfig(learning_rate=6e-4, warmup_steps=50),
            loop=LoopConfig(total_steps=800, log_every=20, save_every=100),
            precision="float32",
            ema_decay=0.995,
            backbone_weights="imagenet",
        )
    )
