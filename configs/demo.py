"""The model that ships as the demo checkpoint; argument: a folder that `python -m data.demo_mix` wrote.

    python -m data.demo_mix --realdata ../shared/realdata --out datasets/demo
    python train.py --config=configs/demo.py:datasets/demo --workdir=runs/demo

MobileNetV2 with ImageNet weights, views of at most 256 pixels, made for two CPU cores. Photographs, collages and scenes
with large-scale and colour jitter; the weights of the sources are in the mix's `mix.json`, and can be changed like
`--config.data.sources.scenes.weight=0`. What the packaged checkpoint was trained on: esg_jax/assets/README.md.
"""

from configs import common
from esg_jax.losses.cropformer import LossConfig
from esg_jax.models.cropformer import CropFormerConfig
from esg_jax.train.config import RunConfig
from esg_jax.train.loop import LoopConfig
from esg_jax.train.optim import OptimConfig


def get_config(folder: str = "datasets/demo"):
    return demo_model(common.mix(folder))


def demo_model(sources):
    return common.as_config(
        RunConfig(
            model=CropFormerConfig.mobilenet_v2(),
            data=common.crop_data(
                sources,
                short_edges=(160, 168, 176, 184, 192),
                max_size=256,
                buckets=((192, 256), (256, 192)),
                zoom=(0.6, 2.0),
                colour=0.5,
                max_entities=40,
                batch_size=4,
            ),
            loss=LossConfig(num_points=1024, shared_points=True),
            optim=OptimConfig(learning_rate=6e-4, warmup_steps=200),
            loop=LoopConfig(total_steps=20_000, log_every=50, save_every=500),
            precision="float32",
            ema_decay=0.999,
            backbone_weights="imagenet",
        )
    )
