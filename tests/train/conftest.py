"""A compiled toy step, shared by all tests of this folder."""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from esg_jax.sharding import make_mesh
from esg_jax.train.optim import OptimConfig
from esg_jax.train.step import StepConfig, TrainStep

# importlib import mode has no packages; the toy model is plain test support code.
_spec = importlib.util.spec_from_file_location("toy", Path(__file__).with_name("toy.py"))
toy = importlib.util.module_from_spec(_spec)
sys.modules["toy"] = toy
_spec.loader.exec_module(toy)

OPTIM = OptimConfig(learning_rate=1e-2, clip_norm=1.0)


def make_toy_step(
    *, devices: int = 1, model: int = 1, rules=None, optim: OptimConfig = OPTIM, total_steps: int = 20, **step
) -> TrainStep:
    mesh = make_mesh(1, -1, model, devices=jax.devices()[:devices])
    kwargs = {} if rules is None else {"rules": rules}
    return TrainStep(
        toy.toy_model(),
        toy.ToyTask(),
        optim=optim,
        total_steps=total_steps,
        mesh=mesh,
        config=StepConfig(**step),
        **kwargs,
    )


@pytest.fixture(scope="session")
def toy_step() -> TrainStep:
    return make_toy_step(ema_decay=0.9)


@pytest.fixture(scope="session")
def make_step():
    return make_toy_step


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """Five pictures of noise with a few rectangles, as COCO files in the layout of data/scenes."""
    folder = tmp_path_factory.mktemp("tiny_data")
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for index in range(5):
        height, width = (int(side) for side in rng.integers(80, 120, 2))
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        for _ in range(4):
            x, y = int(rng.integers(0, width - 20)), int(rng.integers(0, height - 20))
            w, h = (int(side) for side in rng.integers(8, 20, 2))
            pixels[y : y + h, x : x + w] = rng.integers(0, 255, 3)
            corners = [x, y, x + w, y, x + w, y + h, x, y + h]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": index, "category_id": 1, "iscrowd": 0,
                 "area": w * h, "bbox": [x, y, w, h], "segmentation": [corners]}
            )  # fmt: skip
        Image.fromarray(pixels).save(folder / f"{index}.png")
        images.append({"id": index, "file_name": f"{index}.png", "height": height, "width": width})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "entity"}]}
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder
