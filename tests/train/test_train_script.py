"""train.py without training: what a recipe must be, what an evaluation writes, and what is exported for it."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx

from configs import tiny
from esg_jax.evaluation.tasks import EntityTask
from esg_jax.train import main as train
from esg_jax.train.config import RunConfig
from esg_jax.train.logging import MetricWriter
from esg_jax.train.state import TrainState
from esg_jax.weights import load_model, named_arrays, read_info


@pytest.fixture(scope="module")
def run(tiny_data):
    config = RunConfig.from_dict(tiny.get_config(str(tiny_data)).to_dict())
    return dataclasses.replace(config, ema_decay=0.9, loop=dataclasses.replace(config.loop, eval_every=10))


@pytest.fixture(scope="module")
def recipe(tiny_data):
    return EntityTask(annotations=f"{tiny_data}/annotations.json", images=str(tiny_data), grid_images=0)


@dataclasses.dataclass
class Untrained:
    """A step and its state without anything compiled: parameters are 1, their averages 2."""

    config: RunConfig

    def __post_init__(self):
        self.model = self.config.model_def()

    @property
    def state(self) -> TrainState:
        def full(shapes, value):
            return {name: np.full(leaf.shape, value, leaf.dtype) for name, leaf in shapes.items()}

        params, constants = self.model.params, self.model.constants
        return TrainState(np.int32(20), full(params, 1), full(constants, 0), (), full(params, 2), np.int32(0))


def test_averages_are_exported_with_what_inference_needs(run, tmp_path):
    step = Untrained(run)
    path = train.export(run, step, step.state, tmp_path)
    info = read_info(path)[1]
    assert info["steps"] == 20 and info["inference"] == {"min_size": 64, "max_size": 64}
    assert {
        float(value.max()) for name, value in named_arrays(load_model(path)).items() if name in step.model.params
    } == {2}


def test_evaluation_is_that_of_eval_and_goes_into_the_metrics(run, recipe, tmp_path, monkeypatch, caplog):
    """The network is replaced by one that knows the answer."""

    def predict(task, truth, run):
        arrays = dict(nnx.to_flat_state(nnx.state(run.bundle.load())))
        assert task is recipe and {float(arrays[path].get_value().max()) for path in trained(arrays)} == {2}
        content = json.loads((tmp_path / "truth.json").read_text())
        keys = ("image_id", "category_id", "segmentation")
        return [{"score": 0.9, **{key: item[key] for key in keys}} for item in content["annotations"]]

    def trained(arrays):
        return [path for path in arrays if ".".join(map(str, path)) in step.model.params]

    (tmp_path / "truth.json").write_text(open(recipe.annotations).read())
    monkeypatch.setattr(EntityTask, "predict", predict)
    writer, step = MetricWriter(tmp_path), Untrained(run)
    with caplog.at_level("INFO", "esg_jax"):
        train.evaluate(run, recipe, step, tmp_path, writer, step.state)
    writer.close()
    (line,) = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert set(line) == {"step"} | {f"eval/{name}" for name in recipe.columns}
    assert line["step"] == 20 and line["eval/mean_best_iou"] > 0.5
    assert "evaluation at step 20: AP " in caplog.text
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert results["metrics"]["AP"] == line["eval/AP"]
    assert not (tmp_path / "model.safetensors").exists()  # nothing is gathered or written to be evaluated


def test_recipe_and_cadence_belong_together(run, recipe):
    train.check_recipe(run, recipe)
    with pytest.raises(ValueError, match="give both --eval=RECIPE.py and --config.loop.eval_every=STEPS"):
        train.check_recipe(run, None)
    never = dataclasses.replace(run, loop=dataclasses.replace(run.loop, eval_every=0))
    train.check_recipe(never, None)
    with pytest.raises(ValueError, match="give both"):
        train.check_recipe(never, recipe)


def test_missing_validation_data_is_found_before_training(run, recipe, tmp_path):
    with pytest.raises(FileNotFoundError, match="5 images of .*annotations.json are missing, such as .*0.png"):
        train.check_recipe(run, dataclasses.replace(recipe, images=str(tmp_path)))
    with pytest.raises(ValueError, match="no such file"):
        train.check_recipe(run, dataclasses.replace(recipe, annotations=f"{tmp_path}/nowhere.json"))
