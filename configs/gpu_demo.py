"""The demo model on one GPU, from a packed data file; argument: that file. `make gpu` trains it.

    python -m data.scenes --out runs/scenes --count 400
    python -m data.pack --out runs/train.arrayrecord --long-side 640 --source runs/scenes/annotations.json
    python train.py --config=configs/gpu_demo.py:runs/train.arrayrecord --workdir=runs/gpu_demo

Model and views of configs/demo.py, eight times its batch and twice its learning rate, bfloat16, starting from the
packaged weights. The step count is a guess: `make gpu` replaces it by what fits into its time. No GPU was at hand:
neither its speed nor its score is known.
"""

from configs import demo


def get_config(pack: str = "runs/train.arrayrecord"):
    config = demo.get_config()
    config.data.sources = {"pack": {"reader": "packed", "annotations": pack, "images": "", "masks": "", "weight": 1.0}}
    config.data.batch_size = 32
    config.data.num_workers = 8
    config.optim.learning_rate = 1.2e-3
    config.optim.warmup_steps = 200
    config.loop.total_steps = 20_000
    config.loop.log_every = 50
    config.loop.save_every = 500
    config.precision = "bfloat16"
    config.ema_decay = 0.999
    config.backbone_weights = ""
    config.init_from = "esg_jax/assets/demo.safetensors"
    return config
