"""GELLA as in the paper: CLIP ViT-L/14 at 336 px, Vicuna-7B, MobileNetV2 for colormaps; argument: full or lora.

    python train.py --config=configs/gella_vicuna_7b.py:lora --workdir=runs/gella_7b \\
        --config.init_from=llava-1.5-7b.safetensors --config.tokenizer=llava-1.5-7b/tokenizer.model

Data: Panoptic Narrative Grounding on COCO train2017, laid out as docs/gella.md says; batch 16, 50 epochs of 10,813
images (34 k steps), learning rate divided by ten after epochs 46 and 48. Where the paper is silent the docstrings of
`esg_jax.models.gella` and docs/gella.md say what was chosen. Memory on TPU: docs/tpu.md.
"""

import dataclasses

from configs import common
from esg_jax.input.grounding import GroundingDataConfig
from esg_jax.losses.gella import GellaLossConfig
from esg_jax.models.gella import GellaConfig
from esg_jax.models.language.lora import LoraConfig
from esg_jax.train.config import MeshConfig, RunConfig
from esg_jax.train.loop import LoopConfig
from esg_jax.train.optim import NORM_PATTERN, OptimConfig

# The language model, norms and embeddings do not decay; new modules learn ten times faster than pretrained ones.
NO_DECAY = (NORM_PATTERN, r"^llm\.", r"query_feat$", r"query_embed$", r"level_embed$", r"_norm\.scale$")


def get_config(train: str = "full"):
    if train not in ("full", "lora"):
        raise ValueError(f"the argument of this config is {train!r}; choose full or lora")
    model = GellaConfig.vicuna_7b(LoraConfig() if train == "lora" else None)
    # CLIP stays frozen; with adapters only the token embeddings and the head of the language model are trained.
    frozen = r"^visual\.image_encoder\." + (r"|^llm\.(layers|norm)\." if train == "lora" else "")
    coco = "datasets/coco"
    source = {
        "reader": "png",
        "captions": "datasets/png/png_coco_train2017.json",
        "annotations": f"{coco}/annotations/panoptic_train2017.json",
        "images": f"{coco}/train2017",
    }
    return common.as_config(
        RunConfig(
            model=model,
            data=GroundingDataConfig({"png": source}, batch_size=16),
            loss=GellaLossConfig(),
            optim=OptimConfig(
                learning_rate=1e-5,
                multipliers=((r"^(visual|association|lora)\.", 10.0),),
                no_decay=NO_DECAY,
                schedule="step",
                milestones=(46 / 50, 48 / 50),
                warmup_steps=1000,
                clip_norm=1.0,
            ),
            loop=LoopConfig(total_steps=34_000),
            mesh=MeshConfig(),
            precision="bfloat16",
            remat=True,
            tokenizer="datasets/vicuna/tokenizer.model",
            init_optional=r"^(visual\.entity_encoder|association|lora)\.",
            frozen=frozen,
            frozen_precision="bfloat16",
        )
    )


def get_13b(train: str = "full"):
    """The same with Vicuna-13B, for `configs/gella_vicuna_13b.py`."""
    config = RunConfig.from_dict(get_config(train).to_dict())
    model = GellaConfig.vicuna_13b(LoraConfig() if train == "lora" else None)
    return common.as_config(dataclasses.replace(config, model=model))
