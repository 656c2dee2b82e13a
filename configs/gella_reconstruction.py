"""The vision branch of a small GELLA alone: masks -> colormap -> masks (Table 16); argument: entity_mini's folder.

    python train.py --config=configs/gella_reconstruction.py:../shared/realdata --workdir=runs/reconstruction

No text is involved. `--config.model.entities.resoblend.mode=paper` trains the literal wiring of ResoBlend.
`gella_variants.py:colormap` starts GELLA from the result with `--config.init_from=runs/reconstruction
--config.init_optional='^(llm|projector|association|lora)\\.'`.
"""

from configs import common
from esg_jax.losses.cropformer import LossConfig
from esg_jax.losses.gella import GellaLossConfig
from esg_jax.models.backbones.mobilenet_v2 import MobileNetV2Config
from esg_jax.models.colormap import ColormapConfig
from esg_jax.models.entity_encoder import EntityEncoderConfig
from esg_jax.models.gella import GellaConfig
from esg_jax.models.mask_decoder import MaskDecoderConfig
from esg_jax.models.pixel_decoder import PixelDecoderConfig
from esg_jax.models.resoblend import ResoBlendConfig
from esg_jax.train.config import RunConfig
from esg_jax.train.loop import LoopConfig
from esg_jax.train.optim import OptimConfig


def small_entity_encoder() -> EntityEncoderConfig:
    """Half the width and a third of the depth of the paper's decoders."""
    return EntityEncoderConfig(
        MobileNetV2Config(train_affine=True),
        ResoBlendConfig(dim=128, num_heads=4, ffn_dim=512),
        PixelDecoderConfig(conv_dim=128, mask_dim=128, num_layers=3, num_heads=4, ffn_dim=512),
        MaskDecoderConfig(hidden_dim=128, mask_dim=128, num_heads=4, ffn_dim=512, num_layers=3, num_queries=40),
    )


def get_config(root: str = "../shared/realdata"):
    model = GellaConfig(
        entities=small_entity_encoder(),
        vision=MobileNetV2Config(),
        image_size=224,
        colormap=ColormapConfig(size=512),
        llm=None,
    )
    source = {"annotations": f"{root}/entity_mini/entity_train.json", "images": root}
    return common.as_config(
        RunConfig(
            model=model,
            data=common.lsj_data(
                {"entity_mini": source},
                mapper="colormap",
                image_size=model.image_size,
                map_size=model.colormap.size,
                max_entities=model.num_queries,
                batch_size=4,
            ),
            loss=GellaLossConfig(reconstruction=LossConfig(num_points=2048, shared_points=True)),
            optim=OptimConfig(learning_rate=6e-4, warmup_steps=50),
            loop=LoopConfig(total_steps=4000, log_every=20, save_every=200),
            precision="float32",
            ema_decay=0.998,
            backbone_weights="imagenet",
            frozen=r"^visual\.image_encoder\.",
        )
    )
