"""A small CropFormer on 171 real images with 3,085 entity masks; argument: the folder with entity_mini/ in it.

    python train.py --config=configs/entity_mini.py:../shared/realdata --workdir=runs/entity_mini

MobileNetV2 with ImageNet weights, 128 channels, 50 queries, views of at most 384 pixels: made for CPUs.
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
                short_edges=(224, 240, 256, 272, 288),
                max_size=384,
                buckets=((288, 384), (384, 288)),
                max_entities=50,
                batch_size=4,
            ),
            loss=LossConfig(num_points=1536),
            optim=OptimConfig(learning_rate=5e-4, warmup_steps=100),
            loop=LoopConfig(total_steps=4000, log_every=20, save_every=200),
            precision="float32",
            ema_decay=0.998,
            backbone_weights="imagenet",
        )
    )
