"""Reconstruction AP (Table 16) on the validation masks of entity_mini; argument: the folder with entity_mini/ in it.

    python eval.py --config=configs/recipes/reconstruction.py:../shared/realdata --workdir=runs/reconstruction

The paper reports 95.2 / 95.8 / 96.3 for MobileNetV2, Swin-T and Swin-L as colormap encoders, trained on COCO.
"""

from ml_collections import ConfigDict

from esg_jax.config import to_dict
from esg_jax.evaluation.config import EvalConfig


def get_config(root: str = "../shared/realdata"):
    return ConfigDict(
        to_dict(
            EvalConfig(
                task="reconstruction",
                annotations=f"{root}/entity_mini/entity_val.json",
                images=root,
                group_by="source",
                draw_threshold=0.5,
            )
        )
    )
