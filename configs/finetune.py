"""Fine-tunes a model on your own masks; argument: the weights to start from (.safetensors), by default the packaged
ones. See docs/finetuning.md.

    python train.py --config=configs/finetune.py:model.safetensors --workdir=runs/mine \\
        --config.data.sources.mine.annotations=mine/train.json --config.data.sources.mine.images=mine/images

Model, view sizes and precision are those of the weights. 1000 steps at a tenth of the usual learning rate; time and
memory per step are those of the original training.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from configs import common
from esg_jax.config import from_dict
from esg_jax.input.pipeline import DataConfig
from esg_jax.input.readers import SourceConfig
from esg_jax.train.config import RunConfig
from esg_jax.train.loop import LoopConfig
from esg_jax.train.optim import OptimConfig
from esg_jax.weights import demo_checkpoint, read_info


def get_config(weights: str = ""):
    return common.as_config(from_weights(weights, {"mine": dataclasses.asdict(SourceConfig())}))


def from_weights(weights: str, sources: Mapping[str, Any]) -> RunConfig:
    """A run that goes on from weights (empty: the packaged ones), with other data.

    Raises:
        FileNotFoundError, ValueError: there are none, or they are not ours.
    """
    weights = weights or str(demo_checkpoint())
    model, info = read_info(weights)
    # Weights that train.py wrote remember their run; converted ones get the reference's sizes.
    trained = dict(info.get("config", {}))
    if "data" in trained:
        data = from_dict(DataConfig, trained["data"], "data")
    else:
        data = DataConfig(mapper="entity_crop" if model.association else "lsj", batch_size=2)
    return RunConfig(
        model=model,
        data=dataclasses.replace(data, sources=sources),
        optim=OptimConfig(learning_rate=1e-5 if "optim" not in trained else trained["optim"]["learning_rate"] / 10),
        loop=LoopConfig(total_steps=1000, log_every=20, save_every=200),
        precision=trained.get("precision", "bfloat16"),
        init_from=weights,
    )
