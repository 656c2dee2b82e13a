"""`esg predict` from the command line to the files, with a tiny model."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from esg_jax.cli import main
from esg_jax.input.image_io import load_image

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def photo(height, width):
    coarse = np.random.default_rng(height).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of every kind, two bad files and one that is no image."""
    path = tmp_path_factory.mktemp("photos")
    photo(70, 100).save(path / "a.png")
    photo(100, 70).save(path / "a.jpg")  # same stem
    photo(40, 60).convert("RGBA").save(path / "alpha.png")
    photo(40, 60).convert("L").save(path / "gray.png")
    Image.fromarray(np.asarray(photo(40, 60).convert("L")).astype(np.uint16) * 257).save(path / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # camera held upright
    photo(40, 60).save(path / "turned.jpg", exif=exif)
    photo(1, 1).save(path / "pixel.png")
    (path / "broken.png").write_bytes((path / "a.png").read_bytes()[:300])
    (path / "empty.jpg").touch()
    (path / "notes.txt").write_text("not an image")
    return path


GOOD = {"a.png", "a.jpg", "alpha.png", "gray.png", "deep.png", "turned.jpg", "pixel.png"}


@pytest.fixture(scope="module")
def output(folder, tiny_checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "masks"
    arguments = ["--checkpoint", str(tiny_checkpoint), "--buckets", "96x96", "--threshold", "0", "--formats", "all"]
    status = main(["predict", str(folder), "--out", str(out), *arguments])
    return out, status


def test_reports_bad_files_and_goes_on(folder, tiny_checkpoint, output, tmp_path, capfd):
    out, status = output
    assert status == 1
    coco = json.loads((out / "predictions.json").read_text())
    assert {image["file_name"] for image in coco["images"]} == GOOD
    assert {path.name for path in out.glob("*_overlay.png")} == {
        f"{name}_overlay.png" for name in ("a.png", "a.jpg", "alpha", "gray", "deep", "turned", "pixel")
    }
    # Only bad files: nothing needs compiling, so the messages can be read in a moment.
    bad = tmp_path / "bad"
    bad.mkdir()
    for name in ("broken.png", "empty.jpg"):
        (bad / name).write_bytes((folder / name).read_bytes())
    assert main(["predict", str(bad), "--out", str(tmp_path / "o"), "--checkpoint", str(tiny_checkpoint)]) == 1
    error = capfd.readouterr().err
    assert "broken.png" in error and "empty.jpg" in error and "2 of 2 images failed" in error
    strict = ["--strict", "--checkpoint", str(tiny_checkpoint)]
    assert main(["predict", str(bad), "--out", str(tmp_path / "o"), *strict]) == 1
    error = capfd.readouterr().err
    assert "broken.png" in error and "empty.jpg" not in error and "stopped at the first" in error


def test_formats_agree(folder, output):
    out, _ = output
    coco = json.loads((out / "predictions.json").read_text())
    for image in coco["images"]:
        stem = image["file_name"] if image["file_name"].startswith("a.") else image["file_name"].split(".")[0]
        arrays = np.load(out / f"{stem}.npz")
        label_map = arrays["masks"]
        assert label_map.shape == (image["height"], image["width"]) == load_image(folder / image["file_name"]).shape[:2]
        png = Image.open(out / f"{stem}_labels.png")
        np.testing.assert_array_equal(np.asarray(png), label_map)
        records = [record for record in coco["annotations"] if record["image_id"] == image["id"]]
        assert len(records) == len(arrays["scores"]) == label_map.max()
        for row, record in enumerate(records):
            mask = coco_mask.decode(record["segmentation"]).astype(bool)
            np.testing.assert_array_equal(mask, label_map == row + 1)
            assert record["area"] == mask.sum()
            np.testing.assert_array_equal(record["bbox"], coco_mask.toBbox(record["segmentation"]))
            assert record["score"] == pytest.approx(arrays["scores"][row], abs=1e-6)
    assert Image.open(out / "turned_labels.png").size == (40, 60)
    assert max(Image.open(out / "a.png_overlay.png").size) == 200


def refused(capfd, *arguments):
    assert main(["predict", *map(str, arguments)]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("esg predict: ")
    return lines[0]


def test_refuses_with_one_clear_message(tmp_path, tiny_checkpoint, folder, capfd):
    out = ("--out", tmp_path / "out")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "not found" in refused(capfd, tmp_path / "nowhere.jpg", *out)
    assert "no image in folder" in refused(capfd, empty, *out)
    image = folder / "a.png"
    assert "no checkpoint at" in refused(capfd, image, *out, "--checkpoint", tmp_path / "none.safetensors")
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"x" * 100)
    assert "is no checkpoint" in refused(capfd, image, *out, "--checkpoint", garbage)
    checkpoint = ("--checkpoint", tiny_checkpoint)
    assert "min_size" in refused(capfd, image, *out, *checkpoint, "--min-size", "5000")
    assert "multiples of 32" in refused(capfd, image, *out, *checkpoint, "--buckets", "100x100")
    taken = tmp_path / "file"
    taken.touch()
    assert "file" in refused(capfd, image, "--out", taken, *checkpoint)
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps({"images": [{"id": 4, "file_name": "b.png"}]}))
    assert "expected one" in refused(capfd, image, *out, *checkpoint, "--image-ids", ids)
    ids.write_text("[")
    assert "no readable COCO JSON" in refused(capfd, image, *out, *checkpoint, "--image-ids", ids)


def test_explains_missing_demo_weights(tmp_path, folder, capfd, monkeypatch):
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    message = refused(capfd, folder / "a.png", "--out", tmp_path / "out")
    assert "no demo weights" in message and "--checkpoint" in message


def test_threshold_hint_and_image_ids(folder, tiny_checkpoint, tmp_path, capfd):
    ids = tmp_path / "ids.json"
    ids.write_text(
        json.dumps({"images": [{"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": f"{folder.name}/a.png"}]})
    )
    out = tmp_path / "out"
    arguments = ["--checkpoint", str(tiny_checkpoint), "--buckets", "96x96", "--image-ids", str(ids)]
    assert main(["predict", str(folder / "a.png"), "--out", str(out), "--threshold", "0.99", *arguments]) == 0
    printed = capfd.readouterr().out
    assert "1 image, 0 entities" in printed and "try a lower --threshold" in printed
    coco = json.loads((out / "predictions.json").read_text())
    assert [image["id"] for image in coco["images"]] == [8] and coco["annotations"] == []
    assert not np.asarray(Image.open(out / "a_labels.png")).any()
