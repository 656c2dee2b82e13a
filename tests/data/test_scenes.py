import dataclasses
import json

import numpy as np
import pytest

pytest.importorskip("skimage", reason="the photographs come from scikit-image (extra: demo)")

from data.scenes import SceneConfig, render_scene, scene_layout
from data.scenes.dataset import write_scenes
from data.scenes.layout import make_layout
from data.scenes.statistics import measure
from data.scenes.textures import PHOTOS, TILE, photo, window
from esg_jax.input.readers import SourceConfig, open_source

SMALL = SceneConfig(long_side=(240, 300))


@pytest.fixture(scope="module")
def layouts():
    """Full-size layouts, without the slow painting."""
    config = SceneConfig()
    return [make_layout(np.random.default_rng((5, i)), 2000, 1500, config.entities, config.min_area) for i in range(24)]


def test_equal_seeds_give_equal_pixels():
    first, again, other = (render_scene(seed, SMALL) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.labels, again.labels)
    assert first.image.shape != other.image.shape or (first.image != other.image).any()


def test_scene_is_an_exact_partition_in_the_asked_size():
    for seed in range(4):
        scene = render_scene(seed, SMALL)
        assert scene.image.dtype == np.uint8 and scene.image.shape == (*scene.labels.shape, 3)
        assert 240 <= max(scene.labels.shape) <= 300
        np.testing.assert_array_equal(np.unique(scene.labels), np.arange(1, scene.count + 1))


def test_later_items_occlude_earlier_ones(layouts):
    for layout in layouts[:6]:
        painted = np.zeros(layout.labels.shape, bool)
        for number in range(len(layout.items), 0, -1):
            item = layout.items[number - 1]
            if item.mask is None:
                continue
            inside = np.zeros(layout.labels.shape, bool)
            x, y = item.corner
            mask = np.asarray(item.mask) > 127
            rows, columns = np.nonzero(mask)
            rows, columns = rows + y, columns + x
            shown = (rows >= 0) & (columns >= 0) & (rows < inside.shape[0]) & (columns < inside.shape[1])
            inside[rows[shown], columns[shown]] = True
            np.testing.assert_array_equal(layout.labels == number, inside & ~painted)
            painted |= inside


def test_labels_resemble_real_ones(layouts):
    """Bounds around the numbers of real photographs in data/scenes/README.md."""
    blank = np.zeros((1500, 2000, 3), np.uint8)
    statistics = measure(((blank, [layout.labels]) for layout in layouts), floor=False)
    assert statistics.counts.min() >= 3 and statistics.counts.max() <= 45
    assert 9 <= np.median(statistics.counts) <= 20
    assert (statistics.areas < 32 * 32 / (640 * 480)).mean() >= 0.2
    assert np.percentile(statistics.areas, 90) > 0.15
    assert (statistics.parts > 1).mean() >= 0.1
    assert 2.0 <= np.median(statistics.compactness) <= 3.2


def test_no_entity_is_smaller_than_asked():
    config = SceneConfig(long_side=(512, 512), entities=(3, 12), min_area=0.01)
    layouts = [scene_layout((9, i), config)[1] for i in range(24)]
    smallest = [np.bincount(layout.labels.ravel())[1:].min() / layout.labels.size for layout in layouts]
    assert min(smallest) >= 0.01
    assert min(len(layout.items) for layout in layouts) >= 2 and max(len(layout.items) for layout in layouts) > 5


def test_sizes_that_make_no_scene_are_refused():
    for field, value in (
        ("entities", (12, 3)),
        ("entities", (0, 3)),
        ("long_side", (512, 500)),
        ("min_area", 1.0),
        ("portrait", 2),
    ):
        with pytest.raises(ValueError, match=f"{field} is"):
            dataclasses.replace(SMALL, **{field: value})


@pytest.mark.slow
def test_colour_clustering_does_not_find_the_entities():
    config = SceneConfig(long_side=(640, 640))
    scenes = (render_scene((11, i), config) for i in range(16))
    statistics = measure((scene.image, [scene.labels]) for scene in scenes)
    assert 0.2 < statistics.floor_iou.mean() < 0.45


def test_statistics_of_known_shapes():
    labels = np.zeros((480, 640), np.int32)
    labels[100:110, 100:400] = 1  # a bar: perimeter 620, corrected by pi / 4
    labels[300:320, 300:320] = 2
    labels[400:420, 300:320] = 2
    image = np.full((480, 640, 3), 200, np.uint8)
    image[labels == 1] = 20
    statistics = measure([(image, [labels])])
    np.testing.assert_array_equal(statistics.counts, [2])
    np.testing.assert_allclose(statistics.areas, [3000 / 307200, 800 / 307200])
    np.testing.assert_array_equal(statistics.parts, [1, 2])
    np.testing.assert_allclose(statistics.compactness[0], (620 * np.pi / 4) ** 2 / (4 * np.pi * 3000))
    assert statistics.floor_iou[0] > 0.5 and statistics.floor_iou[1] < 0.01
    assert statistics.summary()["entities"] == 2


def test_written_scenes_read_back(tmp_path):
    file = write_scenes(tmp_path, 3, seed=7, config=SMALL)
    source = open_source(SourceConfig(annotations=str(file)))
    assert len(source) == 3
    scene = render_scene((7, 1), SMALL)
    record = source[1]
    entities = record.load_entities()
    np.testing.assert_array_equal(entities.layers[0], scene.labels)
    np.testing.assert_array_equal(entities.areas, np.bincount(scene.labels.ravel())[1:])
    assert np.abs(record.load_image().astype(int) - scene.image).mean() < 12  # JPEG
    annotation = json.loads(file.read_text())["annotations"][0]
    rows, columns = np.nonzero(render_scene((7, 0), SMALL).labels == 1)
    box = [columns.min(), rows.min(), columns.max() - columns.min() + 1, rows.max() - rows.min() + 1]
    assert annotation["bbox"] == box


def test_writer_continues_and_extends(tmp_path):
    whole = json.loads(write_scenes(tmp_path / "whole", 3, config=SMALL).read_text())
    out = tmp_path / "steps"
    write_scenes(out, 1, config=SMALL)
    stamp = (out / "images" / "000000.jpg").stat().st_mtime_ns
    extended = json.loads(write_scenes(out, 3, config=SMALL).read_text())
    assert extended == whole
    assert (out / "images" / "000000.jpg").stat().st_mtime_ns == stamp
    finished = (out / "annotations.json").stat().st_mtime_ns
    write_scenes(out, 2, config=SMALL)
    assert (out / "annotations.json").stat().st_mtime_ns == finished
    assert sorted(path.name for path in out.iterdir()) == ["annotations.json", "images"]
    with pytest.raises(ValueError, match="another seed or configuration"):
        write_scenes(out, 3, seed=1, config=SMALL)


def test_writer_goes_on_with_scenes_of_before_a_field_existed(tmp_path):
    file = write_scenes(tmp_path, 1, config=SMALL)
    content = json.loads(file.read_text())
    del content["info"]["config"]["min_area"]
    file.write_text(json.dumps(content))
    assert len(json.loads(write_scenes(tmp_path, 2, config=SMALL).read_text())["images"]) == 2
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="another seed or configuration"):
        write_scenes(tmp_path, 2, config=dataclasses.replace(SMALL, min_area=0.01))


def test_windows_continue_patterns_and_photographs_without_a_seam():
    for name in PHOTOS:
        pixels = photo(name)
        assert pixels.ndim == 3 and pixels.shape[:2] != (TILE, TILE)
    tile = np.add.outer(np.arange(TILE), np.zeros(TILE, int))
    periodic = window(tile, 2 * TILE, 3, np.random.default_rng(0))
    np.testing.assert_array_equal(periodic[:TILE], periodic[TILE:])
    ramp = np.repeat(np.arange(12)[:, None, None], 3, axis=-1)
    mirrored = window(ramp, 40, 1, np.random.default_rng(0))[:, 0, 0]
    assert np.abs(np.diff(mirrored)).max() == 1
