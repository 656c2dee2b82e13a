"""The vision branch of a small GELLA alone: masks -> colormap -> masks (Table 16); arguments: DATA,SIZE,FOLDER.

Scenes of few, large entities (40 minutes on two CPU cores shared with another training):

    python -m data.scenes --out datasets/large --count 2000 --long-side 512 512 --entities 3 12 --min-area 0.01
    python train.py --config=configs/gella_reconstruction.py:scenes,128,datasets/large --workdir=runs/colormap_128
    python train.py --config=configs/gella_reconstruction.py:scenes,256,datasets/large --workdir=runs/colormap_256 \
        --config.init_from=runs/colormap_128
    python train.py --config=configs/gella_reconstruction.py:scenes,512,datasets/large --workdir=runs/colormap_512 \
        --config.init_from=runs/colormap_256

Photographs: DATA is `entity_mini`, FOLDER holds entity_mini/ (../shared/realdata). `gella_variants.py:colormap` starts
GELLA from the result with `--config.init_from=runs/... --config.init_optional='^(llm|projector|association|lora)\\.'`.

SIZE is the side of the colormap. What is learned on small maps, where a step costs a tenth, holds for large ones: all
positions are relative to the side. Colours are those of a fixed palette ("index"), so that a query can settle on one;
`--config.model.colormap.assignment=random` is the paper's and needs many more steps.
`--config.model.entities.resoblend.mode=paper` trains the literal wiring of ResoBlend.
"""

from configs import common
from esg_jax.losses.cropformer import LossConfig
from esg_jax.losses.gella import GellaLossConfig
from esg_jax.models.backbones.mobilenet_v2 import MobileNetV2Config
from esg_jax.models.cropformer.mask_decoder import MaskDecoderConfig
from esg_jax.models.cropformer.pixel_decoder import PixelDecoderConfig
from esg_jax.models.gella import GellaConfig
from esg_jax.models.gella.colormap import ColormapConfig
from esg_jax.models.gella.entity_encoder import EntityEncoderConfig
from esg_jax.models.gella.resoblend import ResoBlendConfig
from esg_jax.train.config import RunConfig
from esg_jax.train.loop import LoopConfig
from esg_jax.train.optim import OptimConfig

# Side of the colormap: steps and learning rate.
SCHEDULES = {128: (900, 1e-3), 256: (600, 7e-4), 512: (400, 5e-4)}
# Data: queries, and side of the image.
DATA = {"scenes": (16, 96), "entity_mini": (40, 224)}


def small_entity_encoder(num_queries: int) -> EntityEncoderConfig:
    """A quarter of the width and a third of the depth of the paper's decoders, one encoder layer of six."""
    return EntityEncoderConfig(
        MobileNetV2Config(train_affine=True),
        ResoBlendConfig(dim=64, num_heads=4, ffn_dim=128),
        PixelDecoderConfig(conv_dim=64, mask_dim=64, num_layers=1, num_heads=4, ffn_dim=256),
        MaskDecoderConfig(hidden_dim=64, mask_dim=64, num_heads=4, ffn_dim=256, num_layers=3, num_queries=num_queries),
    )


def get_config(arguments: str = "entity_mini,512,../shared/realdata"):
    data, size, folder = (*arguments.split(",", maxsplit=2), "", "")[:3]
    if data not in DATA or not size.isdigit() or int(size) not in SCHEDULES or not folder:
        raise ValueError(
            f"gella_reconstruction.py takes DATA,SIZE,FOLDER with DATA {' or '.join(DATA)} and SIZE one of "
            f"{', '.join(map(str, SCHEDULES))}; got {arguments!r}"
        )
    steps, learning_rate = SCHEDULES[int(size)]
    num_queries, image_size = DATA[data]
    model = GellaConfig(
        entities=small_entity_encoder(num_queries),
        vision=MobileNetV2Config(),
        image_size=image_size,
        colormap=ColormapConfig(size=int(size), assignment="index"),
        llm=None,
    )
    sources = common.scenes(folder)
    if data == "entity_mini":
        sources = {"entity_mini": {"annotations": f"{folder}/entity_mini/entity_train.json", "images": folder}}
    return common.as_config(
        RunConfig(
            model=model,
            data=common.lsj_data(
                sources,
                mapper="colormap",
                image_size=model.image_size,
                map_size=model.colormap.size,
                max_entities=model.num_queries,
                batch_size=4,
            ),
            loss=GellaLossConfig(reconstruction=LossConfig(num_points=1024, shared_points=True)),
            optim=OptimConfig(learning_rate=learning_rate, clip_norm=1.0, warmup_steps=50, weight_decay=0.01),
            loop=LoopConfig(total_steps=steps, log_every=50, save_every=200),
            precision="float32",
            ema_decay=0.998,
            backbone_weights="imagenet",
            frozen=r"^visual\.image_encoder\.",
        )
    )
