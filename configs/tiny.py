"""A CropFormer of 0.13 M parameters for trying things out and for tests; argument: a folder of procedural scenes.

    python -m data.scenes --out /tmp/scenes --count 8 --long-side 200 300
    python train.py --config=configs/tiny.py:/tmp/scenes --workdir=/tmp/tiny

It learns nothing useful. Any CPU; most of the time is compilation.
"""

from configs import common
from esg_jax.losses.cropformer import LossConfig
from esg_jax.models.backbones.swin import SwinConfig
from esg_jax.models.cropformer import CropFormerConfig
from esg_jax.models.cropformer.mask_decoder import MaskDecoderConfig
from esg_jax.models.cropformer.pixel_decoder import PixelDecoderConfig
from esg_jax.models.cropformer.view_association import AssociationConfig
from esg_jax.train.config import RunConfig
from esg_jax.train.loop import LoopConfig
from esg_jax.train.optim import OptimConfig


def get_config(scenes: str = "/tmp/scenes"):
    return common.as_config(
        RunConfig(
            model=CropFormerConfig(
                backbone=SwinConfig(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=4),
                pixel_decoder=PixelDecoderConfig(conv_dim=32, mask_dim=32, num_layers=1, num_heads=2, ffn_dim=32),
                mask_decoder=MaskDecoderConfig(
                    hidden_dim=32, mask_dim=32, num_heads=2, ffn_dim=32, num_layers=1, num_queries=6
                ),
                association=AssociationConfig(num_heads=2, ffn_dim=32),
            ),
            data=common.crop_data(
                common.scenes(scenes),
                short_edges=(48, 56, 64),
                max_size=64,
                buckets=((64, 64),),
                max_entities=8,
                batch_size=2,
            ),
            loss=LossConfig(num_points=64),
            optim=OptimConfig(learning_rate=1e-3),
            loop=LoopConfig(total_steps=20, log_every=1, save_every=5),
            precision="float32",
        )
    )
