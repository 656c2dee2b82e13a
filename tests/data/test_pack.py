"""One file for a data set: the same records as the sources, for training and for evaluation."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import gpu_demo
from data.pack import pack, pack_mix, unpack
from esg_jax.input.pipeline import DataConfig, train_iterator
from esg_jax.input.readers import SourceConfig, open_source
from esg_jax.masks import rle
from esg_jax.train.config import RunConfig

RNG = np.random.default_rng(0)


def write_source(folder: Path, names, categories=("entity",), size=(40, 64)):
    """A COCO file of images with two overlapping entities and a crowd region each."""
    folder.mkdir()
    content = {"images": [], "annotations": []}
    content["categories"] = [{"id": 5 * k + 1, "name": name} for k, name in enumerate(categories)]
    for number, name in enumerate(names):
        Image.fromarray(RNG.integers(0, 256, (*size, 3), np.uint8)).save(folder / name)
        content["images"].append({"id": number, "file_name": name, "height": size[0], "width": size[1]})
        for k, (box, crowd) in enumerate([((0, 0, 20, 30), 0), ((10, 20, 30, 50), 0), ((30, 50, 40, 64), 1)]):
            mask = np.zeros(size, np.uint8)
            mask[box[0] : box[2], box[1] : box[3]] = 1
            entry = {"id": 10 * number + k, "image_id": number, "category_id": content["categories"][-1]["id"]}
            entry |= {"iscrowd": crowd, "segmentation": rle.to_json(rle.encode_labels(mask, 1)[0])}
            content["annotations"].append(entry)
    (folder / "annotations.json").write_text(json.dumps(content))
    return SourceConfig(annotations=str(folder / "annotations.json"))


def packed(file):
    return open_source(SourceConfig(reader="packed", annotations=str(file)))


def masks(entities):
    return {name: entities.mask(k) for k, name in enumerate(entities.ids)}


def test_records_are_those_of_the_source(tmp_path):
    config = write_source(tmp_path / "a", ["x.jpg", "y.png"], ("cat", "dog"))
    assert "2 images, 4 entities" in pack(tmp_path / "p.arrayrecord", [config])
    source, result = open_source(config), pickle.loads(pickle.dumps(packed(tmp_path / "p.arrayrecord")))
    assert result.categories == source.categories and len(result) == 2
    np.testing.assert_array_equal(result.sizes, source.sizes)
    np.testing.assert_array_equal(result.num_entities, source.num_entities)
    for index in range(2):
        want, got = source[index], result[index]
        np.testing.assert_array_equal(got.load_image(), want.load_image())
        assert (got.name, got.image_id) == (want.name, want.image_id)
        want, got = want.load_entities(), got.load_entities()
        order = [got.ids.index(name) for name in want.ids]  # layer by layer in the file
        np.testing.assert_array_equal(got.labels[order], want.labels)
        np.testing.assert_array_equal(got.crowd[order], want.crowd)
        for name, mask in masks(want).items():
            np.testing.assert_array_equal(masks(got)[name], mask)
    with pytest.raises(IndexError):
        result[2]


def test_reduced_and_mixed_sources(tmp_path):
    configs = [write_source(tmp_path / "a", ["x.jpg"], ("cat", "dog")), write_source(tmp_path / "b", ["x.jpg"])]
    pack(tmp_path / "p.arrayrecord", configs, long_side=32)
    result = packed(tmp_path / "p.arrayrecord")
    assert result.categories == ("entity",) and result.sizes.tolist() == [[20, 32], [20, 32]]
    assert result[0].load_image().shape == (20, 32, 3)
    entities = result[0].load_entities()
    assert entities.labels.tolist() == [0, 0, 0]
    expected = np.zeros((20, 32), bool)
    expected[:10, :15] = True
    np.testing.assert_array_equal(masks(entities)[0], expected)


def test_training_batches_come_from_a_pack(tmp_path):
    pack(tmp_path / "p.arrayrecord", [write_source(tmp_path / "a", ["x.jpg", "y.jpg"], size=(64, 96))])
    source = {"reader": "packed", "annotations": str(tmp_path / "p.arrayrecord")}
    sizes = dict(short_edges=(64,), max_size=96, buckets=((64, 96),), batch_size=2, max_entities=4)
    batches = train_iterator(DataConfig(sources={"pack": source}, **sizes))
    batch = next(batches)
    batches.close()
    assert batch["image"].shape == (2, 2, 64, 96, 3) and batch["present"].sum() == 4


def test_unpacked_for_evaluation(tmp_path):
    sources = [write_source(tmp_path / name, ["x.jpg"]) for name in "ab"]  # the same file name twice
    pack(tmp_path / "p.arrayrecord", sources)
    assert "2 images, 6 annotations" in unpack(tmp_path / "p.arrayrecord", tmp_path / "out")
    result = open_source(SourceConfig(annotations=str(tmp_path / "out" / "annotations.json")))
    for index, config in enumerate(sources):
        np.testing.assert_array_equal(result[index].load_image(), open_source(config)[0].load_image())
    assert sorted(result[0].load_entities().areas.tolist()) == [140, 600, 600]


def test_a_mix_keeps_weights_and_what_is_exhaustive(tmp_path):
    sources = {}
    for name, exhaustive, weight in (("a", True, 2.0), ("b", False, 0.5)):
        write_source(tmp_path / name, ["x.jpg", "y.jpg", "z.jpg"], size=(64, 96))
        row = {"annotations": f"{name}/annotations.json", "images": name, "licence": "CC0"}
        sources[name] = row | {"exhaustive": exhaustive, "weight": weight}
    (tmp_path / "mix.json").write_text(json.dumps({"sources": sources}))
    assert "2 sources" in pack_mix(tmp_path, tmp_path / "packed", count=2)
    sources = RunConfig.from_dict(gpu_demo.get_config(str(tmp_path / "packed")).to_dict()).data.source_configs()
    assert {name: (s.reader, s.exhaustive, s.weight) for name, s in sources.items()} == {
        "a": ("packed", True, 2.0),
        "b": ("packed", False, 0.5),
    }
    assert [record.name for record in map(open_source(sources["b"]).__getitem__, range(2))] == ["x.jpg", "y.jpg"]
    with pytest.raises(ValueError, match="limit is 0.0"):
        pack_mix(tmp_path, tmp_path / "packed", max_megabytes=0.01)


def run(*arguments):
    command = [sys.executable, "-m", "data.pack", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])


def test_errors_are_one_line(tmp_path):
    config = write_source(tmp_path / "a", ["x.png"])
    out = tmp_path / "p.arrayrecord"
    for result, wanted in (
        (run("--out", out, "--source", config.annotations, "--max-megabytes", "0.001"), "limit is 0.0"),
        (run("--out", out, "--source", tmp_path / "none.json"), "annotation file not found"),
        (run("--out", tmp_path, "--unpack", config.annotations), "no file of `python -m data.pack`"),
        (run("--out", tmp_path, "--unpack", tmp_path / "none"), "packed data file not found"),
    ):
        assert result.returncode == 1 and wanted in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert not list(tmp_path.glob("*p.arrayrecord*"))  # nothing half-written stays
