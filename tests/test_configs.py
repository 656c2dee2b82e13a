"""Every file in configs/ builds, has the reference's numbers, and says how to run it."""

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags
from safetensors.numpy import save_file

from esg_jax.models.gella.entity_variants import VARIANTS
from esg_jax.models.language.lora import LoraConfig
from esg_jax.named_configs import find_config, with_files
from esg_jax.sharding import LargestDim, parse_rules
from esg_jax.train.config import RunConfig
from esg_jax.train.step import StepConfig
from esg_jax.weights import demo_checkpoint, file_metadata, read_info

FOLDER = Path(__file__).resolve().parent.parent / "configs"
PLAIN = ("cropformer_r50", "cropformer_swin_l", "cropformer_swin_t", "entity_mini", "gpu_demo", "quickstart", "tiny")
GELLA = ("gella_quickstart", "gella_reconstruction", "gella_variants", "gella_vicuna_7b", "gella_vicuna_13b")
MASK2FORMER = ("mask2former_entity", "mask2former_instance", "mask2former_panoptic", "mask2former_semantic")


def load(name, *arguments):
    module = importlib.import_module(f"configs.{name}")
    return module, RunConfig.from_dict(module.get_config(*arguments).to_dict())


@pytest.mark.parametrize("name", PLAIN + MASK2FORMER + GELLA)
def test_config_is_whole(name):
    module, run = load(name)
    assert f"train.py --config=configs/{name}.py" in module.__doc__
    assert RunConfig.from_dict(run.as_dict()) == run


def test_demo_reads_a_mix(tmp_path):
    row = {"annotations": "a.json", "images": "../photos", "exhaustive": False, "weight": 2.0, "licence": "CC0"}
    (tmp_path / "mix.json").write_text(json.dumps({"sources": {"photos": row}}))
    module, run = load("demo", str(tmp_path))
    assert "train.py --config=configs/demo.py" in module.__doc__
    assert RunConfig.from_dict(run.as_dict()) == run
    source = run.data.source_configs()["photos"]
    assert (source.annotations, source.images) == (str(tmp_path / "a.json"), str(tmp_path / "../photos"))
    assert not source.exhaustive and source.weight == 2
    with pytest.raises(FileNotFoundError, match="make it by"):
        load("demo", str(tmp_path / "nothing"))
    (tmp_path / "mix.json").write_text("{}")
    with pytest.raises(ValueError, match="no dictionary 'sources'"):
        load("demo", str(tmp_path))


def test_quickstart_has_the_architecture_of_the_packaged_weights(tmp_path, monkeypatch):
    model, info = read_info(demo_checkpoint())
    _, run = load("quickstart", "folder")
    assert run.model == model and run.init_from == str(demo_checkpoint())
    assert run.data.max_size == info["inference"]["max_size"]
    assert run.data.sources["scenes"]["images"] == "folder" and list(run.data.sources) == ["scenes"]
    # Weights of other sizes take their place.
    decoder = dataclasses.replace(model.mask_decoder, num_queries=100, num_layers=6)
    other = dataclasses.replace(model, mask_decoder=decoder)
    trained = info["config"] | {"precision": "bfloat16"}
    trained["data"] = trained["data"] | {"short_edges": [288], "max_size": 384, "buckets": [[384, 384]]}
    file = tmp_path / "other.safetensors"
    save_file({"x": np.zeros(1)}, file, file_metadata(other, {"config": trained}))
    monkeypatch.setattr("configs.finetune.demo_checkpoint", lambda: file)
    _, run = load("quickstart", "folder")
    assert run.model == other and run.init_from == str(file)
    assert (run.data.short_edges, run.data.max_size, run.data.buckets) == ((288,), 384, ((384, 384),))
    assert run.precision == "float32"
    file.unlink()
    with pytest.raises(FileNotFoundError, match="no weights at .*other.safetensors"):
        load("quickstart", "folder")


@pytest.mark.parametrize("name", MASK2FORMER)
@pytest.mark.parametrize("size", ["swin_t", "swin_l", "r50"])
def test_sizes(name, size):
    _, run = load(name, size)
    classes = {"entity": 1, "instance": 206, "panoptic": 350, "semantic": 150}[name.split("_")[1]]
    assert run.model.mask_decoder.num_classes == classes and run.model.association is None
    if size == "swin_l":
        assert run.model.backbone.window_size == (7 if classes == 1 else 12)
        assert run.model.mask_decoder.num_queries == (200 if classes in (350, 150) else 100)


def test_unknown_size_is_refused():
    with pytest.raises(ValueError, match="unknown model size 'swin_b'; choose one of swin_t, swin_l, r50"):
        load("mask2former_entity", "swin_b")


def test_reference_schedules():
    expected = {
        "cropformer_swin_t": (16, 34_375),
        "cropformer_swin_l": (8, 206_250),
        "mask2former_entity": (16, 103_125),
    }
    for name, (batch, steps) in expected.items():
        _, run = load(name)
        assert (run.data.batch_size, run.loop.total_steps) == (batch, steps)
        assert (run.optim.learning_rate, run.optim.schedule, run.optim.clip_norm) == (1e-4, "poly", 0.01)
    assert load("mask2former_panoptic")[1].optim.learning_rate == 5e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_gella(variant):
    _, run = load("gella_variants", f"{variant},folder")
    assert type(run.model.entities) is type(VARIANTS[variant]) and run.model.num_queries == 40
    assert run.data.sources["captions"]["images"] == "folder"
    with pytest.raises(ValueError, match="unknown variant 'crops'"):
        load("gella_variants", "crops")


def test_gella_starts_from_its_reconstruction():
    (_, first), (_, then) = load("gella_reconstruction"), load("gella_variants", "colormap,folder")
    assert first.model.colormap == then.model.colormap
    definitions = [run.model_def() for run in (first, then)]
    ours, whole = ({**definition.params, **definition.constants} for definition in definitions)
    visual = {name: leaf.shape for name, leaf in whole.items() if name.startswith("visual.")}
    assert {name: leaf.shape for name, leaf in ours.items()} == visual


def test_arguments_of_the_reconstruction():
    for data, queries in (("scenes", 16), ("entity_mini", 40)):
        for size in (128, 256, 512):
            _, run = load("gella_reconstruction", f"{data},{size},some,folder")
            assert run.model.colormap.size == run.data.map_size == size and run.model.num_queries == queries
            assert run.data.sources[data]["images"] == "some,folder"
    for wrong in ("scenes,100,folder", "scenes,512", "512,folder", "photos,512,folder"):
        with pytest.raises(ValueError, match="takes DATA,SIZE,FOLDER with DATA scenes or entity_mini and SIZE one of"):
            load("gella_reconstruction", wrong)


def test_no_config_is_forgotten():
    found = {file.stem for file in FOLDER.glob("*.py")} - {"common", "finetune"}
    assert found == {"demo", *PLAIN, *MASK2FORMER, *GELLA}


def test_gella_sizes():
    """Parameters of the language models, and what adapters leave to train (spec of LLaVA-1.5: 7.06 and 13.35 G)."""
    for name, total in (("gella_vicuna_7b", 6_738_939_904), ("gella_vicuna_13b", 13_016_519_680)):
        _, run = load(name, "lora")
        definition = run.model_def()
        weights = {**definition.params, **definition.constants}
        assert sum(leaf.size for key, leaf in weights.items() if key.startswith("llm.")) == total
        assert {key.split(".")[1] for key in definition.params if key.startswith("llm.")} == {"embed", "head"}
        assert not any(key.startswith("visual.image_encoder.") for key in definition.params)
    with pytest.raises(ValueError, match="choose full or lora"):
        load("gella_vicuna_7b", "half")


def test_gella_data_must_fit_the_model():
    _, run = load("gella_quickstart")
    values = run.as_dict()
    values["data"]["map_size"] = 512
    with pytest.raises(ValueError, match="data.map_size is 512, but the model needs 256"):
        RunConfig.from_dict(values)
    _, other = load("quickstart")
    with pytest.raises(ValueError, match="needs a loss of type GellaLossConfig"):
        RunConfig.from_dict({**run.as_dict(), "loss": other.as_dict()["loss"]})


def test_missing_weights_end_with_one_line(tmp_path):
    command = [sys.executable, "train.py", f"--config=configs/finetune.py:{tmp_path}/none", f"--workdir={tmp_path}/run"]
    run = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True)
    assert run.returncode == 1 and f"no weights at {tmp_path}/none" in run.stderr
    assert "Traceback" not in run.stderr and not (tmp_path / "run").exists()


def test_old_configurations_are_completed():
    values = load("tiny")[1].as_dict()
    old = load("tiny")[1].as_dict()
    del old["model"]["backbone"]["mlp_ratio"], old["keep"]
    assert RunConfig.complete(old) == values
    assert RunConfig.complete({"gone": 1}) == {"gone": 1}


def test_unknown_key_is_named():
    values = load("tiny")[1].as_dict()
    values["model"]["mask_decoder"]["num_querys"] = 3
    with pytest.raises(ValueError, match="unknown key config.model.mask_decoder.num_querys"):
        RunConfig.from_dict(values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "float8"}, "config.precision is 'float8'"),
        ({"data": {"mapper": "lsj"}}, "gives one view, but the model has an association"),
        ({"model": {"association": None}}, "gives two views, but the model has no association"),
        ({"model": {"mask_decoder": {"num_classes": 3}}}, "num_classes is 3, but data.class_agnostic"),
        ({"optim": {"schedule": "cosine"}}, "optim.schedule is 'cosine'"),
    ],
)
def test_contradictions_are_refused(changes, message):
    values = load("tiny")[1].as_dict()

    def merge(into, other):
        for key, value in other.items():
            if isinstance(value, dict):
                merge(into[key], value)
            else:
                into[key] = value

    merge(values, changes)
    with pytest.raises(ValueError, match=message):
        RunConfig.from_dict(values)


def from_command_line(*arguments):
    """The run that `train.py` would make of these flags."""
    values = flags.FlagValues()
    argv = ["train.py", *arguments]
    config = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv, lock_config=True)
    values(argv)
    return RunConfig.from_dict(config.value.to_dict())


@pytest.mark.parametrize(
    ("config", "override", "value"),
    [
        ("tiny", "ema_decay=0.99", 0.99),
        ("tiny", "ema_decay=0", 0),
        ("entity_mini", "ema_decay=None", None),
        ("tiny", "model.association.num_heads=4", 4),
        ("gella_quickstart", "model.lora={'rank': 4}", LoraConfig(rank=4)),
        ("tiny", "loop.profile_steps=(10, 3)", (10, 3)),
        ("tiny", "loop.eval_every=100", 100),
        ("tiny", "wandb=project", "project"),
    ],
)
def test_overrides(config, override, value):
    """Also fields that are None by default, which have no type of their own."""
    run = from_command_line(f"--config={FOLDER}/{config}.py", f"--config.{override}")
    for name in override.split("=")[0].split("."):
        run = getattr(run, name)
    assert run == value


def test_module_is_switched_off_on_the_command_line():
    options = ("--config.model.association=None", "--config.data.mapper=entity_full")
    assert from_command_line(f"--config={FOLDER}/tiny.py", *options).model.association is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ema_decay=soon", "config.ema_decay is 'soon'; expected float or None"),
        ("ema_decay=True", "config.ema_decay is True; expected float or None"),
        ("model.association=3", "config.model.association is 3; expected AssociationConfig or None"),
        ("model.association={'heads': 3}", "unknown key config.model.association.heads"),
        ("loop.log_every=0", "loop.log_every is 0"),
    ],
)
def test_overrides_of_another_type_are_refused(override, message):
    with pytest.raises(ValueError, match=message):
        from_command_line(f"--config={FOLDER}/tiny.py", f"--config.{override}")


def test_impossible_decay_is_refused():
    with pytest.raises(ValueError, match="ema_decay is 1.5; choose a number from 0 to below 1, or None"):
        StepConfig(ema_decay=1.5)


def test_configs_are_found_by_name(tmp_path, monkeypatch):
    """Also those of an installed package, from a folder without configs, under the paths of the documentation."""
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "tiny.py", "configs/tiny.py"):
        assert find_config(name) == f"{FOLDER}/tiny.py"
    assert find_config("recipes/scenes:some:folder") == f"{FOLDER}/recipes/scenes.py:some:folder"
    assert find_config("no_such_config:x") == "no_such_config:x"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.py").touch()
    assert find_config("configs/tiny.py:x") == "configs/tiny.py:x"  # a file that is there is meant
    argv = ["train.py", "--config=tiny:a=b", "--eval", "recipes/scenes", "--config.model.x=tiny", "tiny"]
    assert with_files(argv, "config", "eval") == [
        *("train.py", f"--config={FOLDER}/tiny.py:a=b", "--eval", f"{FOLDER}/recipes/scenes.py"),
        *("--config.model.x=tiny", "tiny"),
    ]


def test_sharding_is_part_of_a_run():
    run = load("tiny")[1]
    assert parse_rules(run.sharding) == run.system.rules
    assert RunConfig.from_dict(json.loads(json.dumps(run.as_dict()))) == run
    old = run.as_dict()
    del old["sharding"]  # runs from before it was
    assert RunConfig.complete(old) == run.as_dict()
    one = from_command_line(f"--config={FOLDER}/tiny.py", "--config.sharding=(('', 'largest:fsdp:1'),)")
    assert parse_rules(one.sharding) == (("", LargestDim(min_size=1)),)
    with pytest.raises(ValueError, match=r"config.sharding\[0\] is \('x', '-,pipe'\); expected a pattern and 'whole'"):
        RunConfig.from_dict({**old, "sharding": [["x", "-,pipe"]]})
