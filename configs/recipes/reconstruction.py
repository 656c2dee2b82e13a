"""Reconstruction AP (Table 16) on masks that were not trained on; arguments: DATA,FOLDER, as gella_reconstruction.py.

    python eval.py --config=configs/recipes/reconstruction.py:entity_mini,../shared/realdata --workdir=runs/colormap_512
    python -m data.scenes --out datasets/large_val --count 100 --seed 1 --long-side 512 512 --entities 3 12 \
        --min-area 0.01
    python eval.py --config=configs/recipes/reconstruction.py:scenes,datasets/large_val --workdir=runs/colormap_512

The paper reports 95.2 / 95.8 / 96.3 for MobileNetV2, Swin-T and Swin-L as colormap encoders, trained on COCO.
"""

from ml_collections import ConfigDict

from configs import common
from esg_jax.config import to_dict
from esg_jax.evaluation.tasks import ReconstructionTask


def get_config(arguments: str = "entity_mini,../shared/realdata"):
    data, _, folder = arguments.partition(",")
    if data == "entity_mini" and folder:
        fields = {"annotations": f"{folder}/entity_mini/entity_val.json", "images": folder, "group_by": "source"}
    elif data == "scenes" and folder:
        fields = common.scenes(folder)["scenes"]
    else:
        raise ValueError(
            f"recipes/reconstruction.py takes DATA,FOLDER with DATA scenes or entity_mini; got {arguments!r}"
        )
    return ConfigDict(to_dict(ReconstructionTask(draw_threshold=0.5, **fields)))
