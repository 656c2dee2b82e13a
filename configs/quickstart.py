"""The training part of `make quickstart`: a small CropFormer on procedural scenes; argument: their folder.

    python -m data.scenes --out runs/scenes --count 200
    python train.py --config=configs/quickstart.py:runs/scenes --workdir=runs/quickstart

MobileNetV2 with ImageNet weights, views of at most 256 pixels, a few hundred steps: made for two CPU cores and
minutes, so expect blobs rather than outlines. configs/demo.py is the same model trained for longer.
"""

from configs import common
from esg_jax.losses.cropformer import LossConfig
from esg_jax.models.cropformer import CropFormerConfig
from esg_jax.train.config import RunConfig
from esg_jax.train.loop import LoopConfig
from esg_jax.train.optim import OptimConfig


def get_config(scenes: str = "runs/scenes"):
    return common.as_config(
        RunConfig(
            model=CropFormerConfig.mobilenet_v2(),
            data=common.crop_data(
                common.scenes(scenes),
                short_edges=(160, 176, 192),
                max_size=256,
                buckets=((192, 256), (256, 192)),
                max_entities=40,
                batch_size=4,
            ),
            loss=LossConfig(num_points=1024, shared_points=True),
            optim=OptimConfig(learning_rate=6e-4, warmup_steps=30),
            loop=LoopConfig(total_steps=300, log_every=10, save_every=50),
            precision="float32",
            backbone_weights="imagenet",
        )
    )
