"""The demo model on one GPU, from packed data; argument: the file, or a folder of a packed mix. `make gpu` trains it.

    python -m data.scenes --out runs/scenes --count 400
    python -m data.pack --out runs/train.arrayrecord --long-side 640 --source runs/scenes/annotations.json
    python train.py --config=configs/gpu_demo.py:runs/train.arrayrecord --workdir=runs/gpu_demo
    python -m data.pack --mix datasets/demo --out datasets/packed --long-side 320 --count 400  # or :datasets/packed

Model and views of configs/demo.py, eight times its batch and twice its learning rate, bfloat16, starting from the
packaged weights. `make gpu` replaces the number of steps by what fits into its time. No GPU was at hand:
neither its speed nor its score is known.
"""

from pathlib import Path

from configs import common, demo
from esg_jax.weights import demo_checkpoint


def get_config(pack: str = "runs/train.arrayrecord"):
    folder = Path(pack).is_dir()
    config = demo.demo_model(common.mix(pack) if folder else {"pack": {"reader": "packed", "annotations": pack}})
    config.data.batch_size = 32
    config.data.num_workers = 8
    config.optim.learning_rate = 1.2e-3
    config.precision = "bfloat16"
    config.backbone_weights = ""
    config.init_from = str(demo_checkpoint())
    return config
