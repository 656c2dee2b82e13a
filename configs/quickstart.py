"""The training part of `make quickstart`: fine-tunes the packaged model on procedural scenes; argument: their folder.

    python -m data.scenes --out runs/scenes --count 48 --long-side 500 700 --entities 4 9 --min-area 0.01 --portrait 0
    python train.py --config=configs/quickstart.py:runs/scenes --workdir=runs/quickstart_training

Sizes of model and views are read from the packaged weights. Made for two CPU cores and minutes: a constant learning
rate and averaged weights, so that the run may stop anywhere. The model gets better at these scenes, which are easy.
"""

import dataclasses

from configs import common, finetune
from esg_jax.losses.cropformer import LossConfig
from esg_jax.train.loop import LoopConfig
from esg_jax.train.optim import OptimConfig


def get_config(scenes: str = "runs/scenes"):
    run = finetune.from_weights("", common.scenes(scenes))
    plain = {"zoom": (1.0, 1.0), "colour": 0.0} if run.data.mapper.startswith("entity") else {}
    return common.as_config(
        dataclasses.replace(
            run,
            data=dataclasses.replace(run.data, max_entities=16, batch_size=4, **plain),
            loss=LossConfig(num_points=1024, shared_points=True),
            optim=OptimConfig(learning_rate=2e-4, schedule="constant", warmup_steps=10),
            loop=LoopConfig(total_steps=300, log_every=10, save_every=50),
            precision="float32",
            ema_decay=0.98,
        )
    )
