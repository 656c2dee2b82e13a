"""The mix of the packaged model: what is in it, and that nothing of the validation images is."""

import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("skimage", reason="scenes come from scikit-image (extra: demo)")

from configs import common
from data import demo_mix
from data.coco_writer import coco_annotations
from data.demo_mix import check_photographs, photographs_of, write_mix
from esg_jax.input.pipeline import DataConfig
from esg_jax.input.readers import open_source

SMALL = {"scenes": 4, "collages": 3, "long_side": (128, 160)}
COLLAGED = ("coco_panoptic", "coco_panoptic_partial", "coco_instances", "coco_instances_more")
LICENCES = [{"id": 4, "name": "BY", "url": "u"}]


def photograph(seed):
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 16, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((160, 120), Image.Resampling.BICUBIC))


def write(root, file, names, seed, categories=1, **image_fields):
    """A COCO file of photographs with a square on a ground."""
    labels = np.ones((120, 160), np.int32)
    labels[30:90, 40:110] = 2
    images, annotations = [], []
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph(seed + number)).save(root / name, quality=95)
        identity = seed + number
        size = {"height": 120, "width": 160}
        images.append({"id": identity, "file_name": name, **size, "source_id": identity, **image_fields})
        annotations += coco_annotations(labels, 2, identity)
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    content = {"images": images, "annotations": annotations, "licenses": LICENCES}
    content["categories"] = [{"id": 1, "name": "entity"}]
    (root / file).write_text(json.dumps(content))


@pytest.fixture
def realdata(tmp_path):
    """The layout of the real folder with three pictures per source."""
    root = tmp_path / "realdata"
    three = [f"{number:012d}.jpg" for number in range(3)]
    write(root, "entity_mini/entity_train.json", [f"photos/{n}" for n in three], 10, source="coco_panoptic")
    content = json.loads((root / "entity_mini/entity_train.json").read_text())
    for image, fraction in zip(content["images"], (0.1, 0.3, 0.0), strict=True):
        image["unlabelled_fraction"] = fraction
    content["images"][2]["source"] = "camvid_connected_components"
    (root / "entity_mini/entity_train.json").write_text(json.dumps(content))
    write(root, "entity_mini/entity_val.json", [f"val/{n}" for n in three], 20, source="coco_panoptic")
    folder = "coco_panoptic_mini/annotations"
    write(root, f"{folder}/panoptic_train2017.json", [f"photos/{n}" for n in three], 10, license=4, flickr_url="f")
    for file, start in (("coco_instances_more", 40), ("facades_1024", 50), ("bsds500", 60), ("msrc_v2", 70)):
        write(root, f"more/{file}/annotations.json", [f"more/{file}/{n}" for n in three], start, source=file)
    write(
        root, f"{folder}/instances_train2017.json", [f"coco_panoptic_mini/train2017/{n}" for n in three], 30, license=4
    )
    file = root / folder / "instances_train2017.json"
    file.write_text(file.read_text().replace("coco_panoptic_mini/train2017/", ""))
    return root


def names_in(folder, name):
    return [image["file_name"] for image in json.loads((folder / f"{name}.json").read_text())["images"]]


def test_the_mix_is_what_a_config_reads(realdata, tmp_path):
    out = tmp_path / "mix"
    write_mix(out, realdata, **SMALL)
    sources = common.mix(str(out))
    assert list(sources) == [
        *("coco_panoptic", "coco_panoptic_partial", "coco_instances", "coco_instances_more", "facades"),
        *("scenes_easy", "scenes", "collages"),
    ]
    configs = DataConfig(sources=sources).source_configs()
    assert {name for name, source in configs.items() if not source.exhaustive} == {
        *("coco_panoptic_partial", "coco_instances", "coco_instances_more", "facades")
    }
    for source in configs.values():
        record = open_source(source)[0]
        assert len(record.load_entities().labels) and record.load_image().size
    # CamVid and ADE20K are left out, sparse labels told apart, licences kept.
    assert names_in(out, "coco_panoptic") == ["photos/000000000000.jpg"]
    assert names_in(out, "coco_panoptic_partial") == ["photos/000000000001.jpg"]
    assert json.loads((out / "coco_panoptic.json").read_text())["images"][0]["license"] == 4
    assert len(open_source(configs["scenes_easy"])) == 1 and len(open_source(configs["scenes"])) == 3
    stamp = (out / "collages" / "images" / "000000.jpg").stat().st_mtime_ns
    write_mix(out, realdata, **SMALL)
    assert (out / "collages" / "images" / "000000.jpg").stat().st_mtime_ns == stamp


def test_research_sources_come_on_request_only(realdata, tmp_path):
    out = tmp_path / "mix"
    write_mix(out, realdata, research=True, **{**SMALL, "scenes": 0})
    sources = common.mix(str(out))
    assert {"bsds500", "msrc_v2"} < set(sources) and "scenes" not in sources
    assert sources["bsds500"]["exhaustive"] and not sources["msrc_v2"]["exhaustive"]
    pasted = json.loads((out / "collages" / "annotations.json").read_text())["sources"]
    assert not any("bsds" in row["file_name"] or "msrc" in row["file_name"] for row in pasted)


def test_scenes_alone(tmp_path):
    write_mix(tmp_path, None, **SMALL)
    assert list(common.mix(str(tmp_path))) == ["scenes_easy", "scenes"]
    with pytest.raises(ValueError, match="nothing to write"):
        write_mix(tmp_path, None, **{**SMALL, "scenes": 0})
    with pytest.raises(FileNotFoundError, match=r"make it by: python -m data\.demo_mix"):
        common.mix(str(tmp_path / "elsewhere"))


def test_a_crop_of_a_validation_image_stops_the_command(realdata, tmp_path, monkeypatch, capsys):
    crop = Image.open(realdata / "val" / "000000000001.jpg").crop((20, 10, 150, 110))
    canvas = Image.fromarray(photograph(99))
    canvas.paste(crop, (0, 0))
    folder = realdata / "more" / "coco_instances_more"
    canvas.save(folder / "leak.png")
    content = json.loads((folder / "annotations.json").read_text())
    content["images"][1]["file_name"] = "more/coco_instances_more/leak.png"
    (folder / "annotations.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"1 validation .*leak\.png shows val/000000000001\.jpg"):
        write_mix(tmp_path / "mix", realdata, **SMALL)
    monkeypatch.setattr("sys.argv", ["x", "--out", str(tmp_path / "mix"), "--realdata", str(realdata)])
    with pytest.raises(SystemExit, match="error: 1 validation images are in the training data"):
        demo_mix.main()
    monkeypatch.setattr("sys.argv", ["x", "--out", str(tmp_path / "mix"), "--realdata", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match=r"error: annotation file not found: .*entity_train\.json"):
        demo_mix.main()


def test_collages_show_photographs_of_the_mix_alone(realdata, tmp_path):
    out = tmp_path / "mix"
    write_mix(out, realdata, **{**SMALL, "collages": 12})
    content = json.loads((out / "collages" / "annotations.json").read_text())
    used = {name for image in content["images"] for name in image["sources"]}
    known = {name for source in COLLAGED for name in names_in(out, source)}
    assert used and used <= known
    assert {row["file_name"] for row in content["sources"]} == used


def test_no_validation_image_in_the_real_mix(shared, tmp_path):
    """Photographs by their pixels; collages, which are drawn from the same files, by their provenance."""
    realdata = shared("realdata")
    sources = demo_mix._write_photographs(tmp_path, realdata, research=True)
    check_photographs(tmp_path, sources, realdata)
    training, held_out = photographs_of(tmp_path, sources), demo_mix.validation_images(realdata)
    assert len(training) == 100 + 166 + 63 + 44 + 334 + 312 and len(held_out) == 83
    assert not {path.resolve() for path in training.values()} & {path.resolve() for path in held_out.values()}
    content = json.loads((tmp_path / "coco_panoptic.json").read_text())
    assert {image["source"] for image in content["images"]} == {"coco_panoptic"}
