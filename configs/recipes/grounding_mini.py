"""PNG AR on the validation captions of grounding_mini, for a small GELLA; argument: the folder with grounding_mini/.

    python eval.py --config=configs/recipes/grounding_mini.py:../shared/realdata --workdir=runs/gella
    python eval.py --config=configs/recipes/grounding_mini.py --workdir=runs/gella --out=runs/gella/eval_predicted \\
        --config.input_masks=segmenter

Not a published number, and the phrases are linked by rule. `benchmarks/grounding_mini.py` puts it beside baselines that
know nothing of the image. `--config.phrases=generated` measures AR_text, too.
"""

from ml_collections import ConfigDict

from esg_jax.config import to_dict
from esg_jax.evaluation.tasks import NarrativeTask


def get_config(root: str = "../shared/realdata"):
    config = NarrativeTask(
        reader="linked_captions",
        captions=f"{root}/grounding_mini/captions_val.json",
        images=root,
        batch_size=4,
    )
    return ConfigDict(to_dict(config))
