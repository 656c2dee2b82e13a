"""The model that ships as the demo checkpoint; argument: a folder of procedural scenes.

    python -m data.scenes --out runs/scenes --count 2000
    python train.py --config=configs/demo.py:runs/scenes --workdir=runs/demo

The quickstart's model, larger views, longer. Every picture the scenes are made of may be redistributed
(data/scenes/README.md).
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
                short_edges=(208, 224, 240, 256, 272, 288),
                max_size=384,
                buckets=((288, 384), (384, 288)),
                max_entities=40,
                batch_size=4,
            ),
            loss=LossConfig(num_points=1536),
            optim=OptimConfig(learning_rate=5e-4, warmup_steps=200),
            loop=LoopConfig(total_steps=10_000, log_every=50, save_every=250),
            precision="float32",
            ema_decay=0.999,
            backbone_weights="imagenet",
        )
    )
