"""eval.py on two tiny images: model to files to numbers, and the same numbers from the saved files."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from esg_jax.evaluation import BestOverlap, EntityAP
from esg_jax.evaluation.tasks import EntityTask
from esg_jax.inference.entities.predictor import Predictor
from esg_jax.masks import rle
from esg_jax.models.backbones.swin import SwinConfig
from esg_jax.models.cropformer import CropFormer, CropFormerConfig
from esg_jax.models.cropformer.mask_decoder import MaskDecoderConfig
from esg_jax.models.cropformer.pixel_decoder import PixelDecoderConfig
from esg_jax.models.cropformer.view_association import AssociationConfig
from esg_jax.weights import save_weights

REPO = Path(__file__).resolve().parents[2]
TINY = CropFormerConfig(
    backbone=SwinConfig(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=4),
    pixel_decoder=PixelDecoderConfig(conv_dim=32, mask_dim=32, num_layers=1, num_heads=2, ffn_dim=32),
    mask_decoder=MaskDecoderConfig(hidden_dim=32, mask_dim=32, num_heads=2, ffn_dim=32, num_layers=1, num_queries=6),
    association=AssociationConfig(num_heads=2, ffn_dim=32),
)


def random_model(config):
    """Weights from numpy: nothing is compiled to initialise them."""
    rng = np.random.default_rng(0)
    graph, state = nnx.split(nnx.eval_shape(lambda: CropFormer(config, rngs=nnx.Rngs(0))))
    arrays = {
        path: variable.replace(jnp.asarray(rng.normal(0, 0.3, variable.get_value().shape), jnp.float32))
        for path, variable in nnx.to_flat_state(state)
    }
    return nnx.merge(graph, nnx.from_flat_state(arrays))


@pytest.fixture(scope="module")
def tiny_set(tmp_path_factory):
    """Two photographs-like images with three entities each, and random weights."""
    folder = tmp_path_factory.mktemp("set")
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(2):
        size = (60, 80)
        pixels = rng.integers(0, 255, (*size, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": 60, "width": 80, "source": "ab"[i]})
        for k in range(3):
            mask = np.zeros(size, bool)
            mask[20 * k : 20 * k + 20] = True
            code = rle.encode(mask[None])[0]
            code = rle.to_json(code)
            annotations.append(
                {"id": 3 * i + k + 1, "image_id": i, "category_id": 1, "iscrowd": 0, "area": 1600, "segmentation": code}
            )
    categories = [{"id": 1, "name": "entity"}]
    (folder / "gt.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    save_weights(folder / "tiny.safetensors", random_model(TINY))
    return folder


def evaluate(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    return subprocess.run(
        [sys.executable, str(REPO / "eval.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=REPO,
        check=False,
    )


def overrides(folder, recipe="entity_mini.py", annotations="gt.json"):
    return [
        f"--config={REPO}/configs/recipes/{recipe}",
        f"--config.annotations={folder / annotations}",
        f"--config.images={folder}",
        "--config.min_size=64",
        "--config.max_size=96",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("views", [1, 5])
def test_model_to_numbers_and_again_from_the_files(tiny_set, tmp_path, views):
    run = evaluate(
        *overrides(tiny_set), f"--checkpoint={tiny_set}/tiny.safetensors", f"--views={views}", f"--out={tmp_path}/first"
    )
    assert run.returncode == 0, run.stderr
    first = json.loads((tmp_path / "first" / "results.json").read_text())
    assert set(first["groups"]) == {"a", "b"}
    assert Image.open(tmp_path / "first" / "grid.png").size[0] > 800
    again = evaluate(
        *overrides(tiny_set),
        f"--predictions={tmp_path}/first/predictions.json",
        f"--before={tmp_path}/first/predictions.json",
        f"--out={tmp_path}/again",
    )
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "again" / "results.json").read_text())["metrics"] == first["metrics"]
    columns = [Image.open(tmp_path / name / "grid.png").size[0] // 560 for name in ("first", "again")]
    assert columns == [3, 4]  # image, ground truth, prediction; and the one before
    # The same numbers straight from the predictor, without files.
    predictor = Predictor.from_checkpoint(tiny_set / "tiny.safetensors", views=views, min_size=64, max_size=96)
    gt = json.loads((tiny_set / "gt.json").read_text())
    metrics = EntityAP(), BestOverlap()
    for image in gt["images"]:
        prediction = predictor(tiny_set / image["file_name"])
        for metric in metrics:
            metric.add(image["id"], prediction, [a for a in gt["annotations"] if a["image_id"] == image["id"]])
    assert metrics[1].result()["num_entities"] == 6
    for metric in metrics:
        for name, value in metric.result().items():
            if isinstance(value, float):
                assert first["metrics"][name] == pytest.approx(value, abs=1e-6), name


def test_files_of_several_hosts_score_as_one(tiny_set, tmp_path):
    gt = json.loads((tiny_set / "gt.json").read_text())
    rng = np.random.default_rng(0)
    records = [
        {"image_id": a["image_id"], "category_id": 1, "score": float(rng.random()), "segmentation": a["segmentation"]}
        for a in gt["annotations"] + gt["annotations"][::2]
    ]
    task = EntityTask(annotations=str(tiny_set / "gt.json"), images=str(tiny_set), group_by="source")
    files = [tmp_path / name for name in ("all.json", "first.json", "second.json")]
    for file, wanted in zip(files, ((0, 1), (0,), (1,)), strict=True):
        file.write_text(json.dumps([r for r in records if r["image_id"] in wanted]))
    whole = task.score(task.truth(), files[:1])
    assert task.score(task.truth(), files[1:]) == whole
    assert whole["metrics"]["mean_best_iou"] == 1.0 and set(whole["groups"]) == {"a", "b"}


@pytest.fixture(scope="module")
def tiny_classes(tiny_set, tmp_path_factory):
    """The same images with three classes, as instance, panoptic and semantic ground truth, and random weights."""
    folder = tmp_path_factory.mktemp("classes")
    content = json.loads((tiny_set / "gt.json").read_text())
    content["categories"] = [{"id": 10 * c, "name": str(c), "isthing": int(c != 2)} for c in (1, 2, 3)]
    for i, annotation in enumerate(content["annotations"]):
        annotation["category_id"] = 10 * (1 + i % 3)
    (folder / "instances.json").write_text(json.dumps(content))
    labels = np.repeat([0, 1, 2], 20)[:, None] * np.ones((1, 80), np.uint8)
    records = []
    for name in ("panoptic", "semantic"):
        (folder / name).mkdir()
    for i in range(2):
        ids = (labels + 1).astype(np.uint8)
        Image.fromarray(np.stack([ids, ids * 0, ids * 0], -1)).save(folder / "panoptic" / f"{i}.png")
        Image.fromarray(labels.astype(np.uint8)).save(folder / "semantic" / f"{i}.png")
        segments = [{"id": k, "category_id": 10 * k, "iscrowd": 0, "area": 1600} for k in (1, 2, 3)]
        records.append({"image_id": i, "file_name": f"{i}.png", "segments_info": segments})
    (folder / "panoptic.json").write_text(json.dumps(content | {"annotations": records}))
    (folder / "semantic.txt").write_text("0.png 0.png\n1.png 1.png\n")
    config = dataclasses.replace(
        TINY, association=None, mask_decoder=dataclasses.replace(TINY.mask_decoder, num_classes=3)
    )
    save_weights(folder / "tiny.safetensors", random_model(config))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe, annotations, column",
    [
        ("coco_instance", "instances.json", "AP"),
        ("coco_panoptic", "panoptic.json", "PQ"),
        ("entityseg_semantic", "semantic.txt", "mIoU"),
    ],
)
def test_class_aware_tasks(tiny_set, tiny_classes, tmp_path, recipe, annotations, column):
    arguments = overrides(tiny_set, f"sets.py:{recipe}", tiny_classes / annotations)
    if column == "mIoU":
        arguments += ["--config.num_classes=3", "--config.masks="]
    run = evaluate(*arguments, f"--checkpoint={tiny_classes}/tiny.safetensors", f"--out={tmp_path}/first")
    assert run.returncode == 0, run.stderr
    first = json.loads((tmp_path / "first" / "results.json").read_text())["metrics"]
    assert 0 <= first[column] <= 1
    again = evaluate(*arguments, f"--predictions={tmp_path}/first/predictions.json", f"--out={tmp_path}/again")
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "again" / "results.json").read_text())["metrics"] == first
    assert (tmp_path / "again" / "grid.png").is_file()


@pytest.mark.slow
def test_mistakes_end_with_one_line(tiny_set, tmp_path):
    run = evaluate(*overrides(tiny_set), f"--out={tmp_path}")
    assert run.returncode == 1 and "give --checkpoint FILE" in run.stderr
    run = evaluate(
        *overrides(tiny_set), f"--out={tmp_path}", "--config.annotations=nowhere.json", "--predictions=x.json"
    )
    assert run.returncode == 1 and "no such file: nowhere.json" in run.stderr
    run = evaluate(*overrides(tiny_set), f"--out={tmp_path}", "--predictions=x.json", "--before=y.json")
    assert run.returncode == 1 and "no earlier predictions at y.json" in run.stderr
    assert "Traceback" not in run.stderr
