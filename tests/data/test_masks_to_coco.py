import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.masks_to_coco import convert_pair
from esg_jax.input.readers import SourceConfig, open_source

LABELS = np.array([[0, 7, 7], [300, 300, 7]], np.uint16)


@pytest.fixture
def folders(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for name in ("a", "b", "c"):
        Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(tmp_path / "images" / f"{name}.jpg")
    Image.fromarray(LABELS).save(tmp_path / "masks" / "a.png")
    Image.fromarray(LABELS[:1]).save(tmp_path / "masks" / "b.png")
    Image.fromarray(np.zeros((2, 3), np.uint8)).save(tmp_path / "masks" / "c.png")
    return tmp_path


def run(folder, *extra):
    command = [sys.executable, "-m", "data.masks_to_coco", "--images", folder / "images", "--masks", folder / "masks"]
    command += ["--out", folder / "out.json", *extra]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])


def test_a_bad_pair_is_reported_and_the_rest_reads_back(folders):
    result = run(folders)
    assert result.returncode == 0 and "b.png is 1x3 pixels" in result.stderr and "1 left out" in result.stdout
    source = open_source(SourceConfig(annotations=str(folders / "out.json"), images=str(folders / "images")))
    assert [source[i].name for i in range(len(source))] == ["a.jpg", "c.jpg"]
    np.testing.assert_array_equal(source[0].load_entities().layers[0], [[0, 1, 1], [2, 2, 1]])
    assert source.num_entities.tolist() == [2, 0]
    assert json.loads((folders / "out.json").read_text())["annotations"][1]["bbox"] == [0, 1, 2, 1]


def test_strict_stops(folders):
    result = run(folders, "--strict")
    assert result.returncode == 1 and result.stderr.startswith("error:") and not (folders / "out.json").exists()


def test_missing_mask_is_named(folders):
    with pytest.raises(FileNotFoundError, match="z.png"):
        convert_pair(folders / "images" / "a.jpg", folders / "masks" / "z.png", 1, 1)
