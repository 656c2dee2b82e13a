"""AP^e on procedural scenes; argument: the folder that `python -m data.scenes` wrote.

python -m data.scenes --out runs/scenes_val --count 16 --seed 1
python eval.py --config=configs/recipes/scenes.py:runs/scenes_val --workdir=runs/demo
"""

from ml_collections import ConfigDict

from esg_jax.config import to_dict
from esg_jax.evaluation.tasks import EntityTask


def get_config(scenes: str = "runs/scenes_val"):
    config = EntityTask(annotations=f"{scenes}/annotations.json", images=scenes, score_mode="entityness")
    return ConfigDict(to_dict(config))
