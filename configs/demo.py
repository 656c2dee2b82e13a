"""The model that ships as the demo checkpoint; argument: a folder of procedural scenes[,annotations,images].

    python -m data.scenes --out runs/scenes --count 500 --long-side 800 1100
    python train.py --config=configs/demo.py:runs/scenes --workdir=runs/demo

The quickstart's model and views, trained for longer. Every picture the scenes are made of may be redistributed
(data/scenes/README.md). Real photographs in COCO format can be mixed in, half of the images; the packaged checkpoint
took those that `python -m data.licence_subset --licences 4 5 7 8` keeps (esg_jax/assets/README.md):

    python train.py --config=configs/demo.py:runs/scenes,kept.json,IMAGES --workdir=runs/demo_photos \\
        --config.init_from=runs/demo
"""

from configs import common
from esg_jax.losses.cropformer import LossConfig
from esg_jax.models.cropformer import CropFormerConfig
from esg_jax.train.config import RunConfig
from esg_jax.train.loop import LoopConfig
from esg_jax.train.optim import OptimConfig


def get_config(argument: str = "runs/scenes"):
    scenes, *photos = argument.split(",")
    sources = common.scenes(scenes)
    if photos:
        annotations, images = photos
        sources["photos"] = {"annotations": annotations, "images": images}
    return common.as_config(
        RunConfig(
            model=CropFormerConfig.mobilenet_v2(),
            data=common.crop_data(
                sources,
                short_edges=(160, 168, 176, 184, 192),
                max_size=256,
                buckets=((192, 256), (256, 192)),
                max_entities=40,
                batch_size=4,
            ),
            loss=LossConfig(num_points=1024, shared_points=True),
            optim=OptimConfig(learning_rate=6e-4, warmup_steps=50),
            loop=LoopConfig(total_steps=1000, log_every=20, save_every=100),
            precision="float32",
            ema_decay=0.995,
            backbone_weights="imagenet",
        )
    )
