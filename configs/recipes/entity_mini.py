"""AP^e on the 83 validation images (1,221 entities) of entity_mini; argument: the folder with entity_mini/ in it.

    python eval.py --config=configs/recipes/entity_mini.py:../shared/realdata --workdir=runs/entity_mini --views=5

Not a published number. For scale: an untrained superpixel partition reaches mean best IoU 36 and recall 24 at IoU 0.5
on the coco_panoptic group.
"""

from ml_collections import ConfigDict

from esg_jax.config import to_dict
from esg_jax.evaluation.tasks import EntityTask


def get_config(root: str = "../shared/realdata"):
    return ConfigDict(
        to_dict(EntityTask(annotations=f"{root}/entity_mini/entity_val.json", images=root, group_by="source"))
    )
