import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("skimage", reason="textured backgrounds come from scikit-image (extra: demo)")

from data import collage
from data.coco_writer import coco_annotations
from data.collage import CollageConfig, CollageSource, make_collage, parse_source, write_collages
from esg_jax.input.readers import SourceConfig, open_source

SMALL = CollageConfig(long_side=(160, 200))


def write_coco(folder, name, pictures, **fields):
    """A COCO file of (image, labels) pairs."""
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "entity"}], **fields}
    for number, (image, labels) in enumerate(pictures, start=1):
        file = f"{name}_{number}.png"
        Image.fromarray(image).save(folder / file)
        height, width = labels.shape
        entry = {
            "id": number,
            "file_name": file,
            "height": height,
            "width": width,
            "license": 4,
            "flickr_url": "http://x",
        }
        content["images"].append(entry)
        content["annotations"] += coco_annotations(labels, int(labels.max()), number)
    for number, annotation in enumerate(content["annotations"], start=1):
        annotation["id"] = number
    (folder / f"{name}.json").write_text(json.dumps(content))
    return str(folder / f"{name}.json")


def disc(size, centre, radius):
    y, x = np.mgrid[: size[0], : size[1]]
    return (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Blue and green halves to paste on; red discs, annotated alone, to cut out."""
    folder = tmp_path_factory.mktemp("sources")
    size = (150, 200)
    halves = np.where(np.arange(size[1])[None] < 90, 1, 2) * np.ones(size, np.int32)
    ground = np.array([[0, 0, 0], [20, 20, 220], [20, 200, 20]], np.uint8)[halves]
    dense = write_coco(folder, "dense", [(ground, halves)], licenses=[{"id": 4, "name": "BY", "url": "u"}])
    things = disc(size, (70, 100), 40).astype(np.int32)
    red = np.where(things[..., None] > 0, np.uint8([230, 30, 30]), np.uint8([128, 128, 128]))
    cut = write_coco(folder, "cut", [(red, things)])
    return CollageSource(dense, str(folder)), CollageSource(cut, str(folder), background=False)


def plain(monkeypatch):
    """Colours stay, so that the pixels tell what was painted."""
    monkeypatch.setattr(collage.augment, "random_colour_matrix", lambda rng, strength: np.eye(3, 4))


def test_labels_say_what_is_on_top(sources, monkeypatch):
    plain(monkeypatch)
    config = dataclasses.replace(SMALL, textured=0.0, mosaic=0.0, min_area=0.001)
    pasted = 0
    for seed in range(8):
        picture = make_collage(seed, sources, config)
        red = picture.image[..., 0].astype(int) > 125  # red where it is mixed in by half and more
        colours = np.array([np.median(picture.image[picture.labels == k], 0) for k in range(1, picture.count + 1)])
        is_disc = np.concatenate([[False], colours[:, 0] > 200])
        # Unlabelled pixels do not exist here, so every pixel is either a disc's or a half's.
        assert (picture.labels > 0).all()
        # One pixel in a thousand may round to the other side of a half.
        assert (is_disc[picture.labels] != red).mean() < 2e-3
        assert {tuple(c) for c in colours[~is_disc[1:]].astype(int)} <= {(20, 20, 220), (20, 200, 20)}
        pasted += int(is_disc.sum())
    assert pasted >= 16


def test_every_entity_shows_the_least_area_and_slivers_are_not_made(sources):
    config = dataclasses.replace(SMALL, entities=(10, 20), min_area=0.01)
    for seed in range(8):
        picture = make_collage(seed, sources, config)
        areas = np.bincount(picture.labels.ravel(), minlength=picture.count + 1)
        assert len(areas) == picture.count + 1
        assert areas[1:].min() >= 0.01 * picture.labels.size
        assert areas[0] == 0


def test_backgrounds_with_unlabelled_entities_are_never_used(sources, monkeypatch):
    kinds = set()
    for seed in range(12):
        picture = make_collage(seed, sources, dataclasses.replace(SMALL, textured=0.3))
        gray = np.abs(picture.image.astype(int) - 128).max(-1) < 3
        if picture.fields["background"] != "scene":
            assert gray.mean() < 0.02 and "dense_1.png" in picture.fields["sources"]
        kinds.add(picture.fields["background"])
    assert kinds == {"photograph", "mosaic", "scene"}
    with pytest.raises(ValueError, match="no source may be a background"):
        make_collage(0, sources[1:], dataclasses.replace(SMALL, textured=0.0))
    sparse = dataclasses.replace(sources[1], background=True)
    with pytest.raises(ValueError, match="at most 5% unlabelled"):
        make_collage(0, [sparse], dataclasses.replace(SMALL, textured=0.0))


def test_large_pictures_take_many_photographs(sources):
    config = CollageConfig(long_side=(900, 900), textured=0.0, mosaic=0.0, scales=(0.1, 1.5))
    picture = make_collage(0, sources, config)
    assert picture.fields["background"] == "mosaic" and picture.count > 6


def test_what_the_border_cut_off_stays_at_the_border(tmp_path, sources, monkeypatch):
    plain(monkeypatch)
    things = disc((150, 200), (75, 0), 50).astype(np.int32)
    red = np.where(things[..., None] > 0, np.uint8([230, 30, 30]), np.uint8([128, 128, 128]))
    cut = CollageSource(write_coco(tmp_path, "half", [(red, things)]), str(tmp_path), background=False)
    config = dataclasses.replace(SMALL, entities=(1, 1), textured=0.0, mosaic=0.0)
    found = 0
    for seed in range(12):
        picture = make_collage(seed, [sources[0], cut], config)
        is_red = picture.image[..., 0] > 200
        if not is_red.any() or "half_1.png" not in picture.fields["sources"]:
            continue
        found += 1
        assert is_red[:, 0].any() or is_red[:, -1].any()
    assert found >= 2


def test_entities_unfit_for_pasting():
    image = np.zeros((100, 100, 3), np.uint8)
    across = np.zeros((100, 100), bool)
    across[40:70] = True  # from border to border
    assert collage._cut_out(image, across, "") is None
    pieces = np.zeros((100, 100), bool)
    pieces[20:50, 10:40] = pieces[20:50, 60:90] = True
    assert collage._cut_out(image, pieces, "") is None
    small = np.zeros((100, 100), bool)
    small[50:60, 50:60] = True
    assert collage._cut_out(image, small, "") is None
    good = disc((100, 100), (50, 50), 30)
    assert collage._cut_out(image, good, "").cut == (False,) * 4


def test_written_collages_read_back_and_say_where_they_are_from(tmp_path, sources):
    file = write_collages(tmp_path / "out", 4, sources, seed=3, config=SMALL)
    records = open_source(SourceConfig(annotations=str(file)))
    picture = make_collage((3, 2), sources, SMALL)
    entities = records[2].load_entities()
    assert len(entities.layers) == 1
    np.testing.assert_array_equal(entities.layers[0], picture.labels)
    content = json.loads(file.read_text())
    rows = {row["file_name"]: row for row in content["sources"]}
    assert (
        {name for image in content["images"] for name in image["sources"]} == set(rows) <= {"dense_1.png", "cut_1.png"}
    )
    assert rows["dense_1.png"]["license"] == 4 and content["licenses"] == [{"id": 4, "name": "BY", "url": "u"}]


def test_writer_continues_and_refuses_other_settings(tmp_path, sources):
    whole = json.loads(write_collages(tmp_path / "whole", 3, sources, config=SMALL).read_text())
    out = tmp_path / "steps"
    write_collages(out, 1, sources, config=SMALL)
    assert json.loads(write_collages(out, 3, sources, config=SMALL).read_text()) == whole
    assert sorted(path.name for path in out.iterdir()) == ["annotations.json", "images"]
    for change in (
        {"seed": 1},
        {"sources": sources[:1]},
        {"config": dataclasses.replace(SMALL, min_area=0.02)},
        {"sources": (dataclasses.replace(sources[0], background=False), sources[1])},
    ):
        arguments = {"sources": sources, "config": SMALL, **change}
        with pytest.raises(ValueError, match="another seed or configuration"):
            write_collages(out, 3, **arguments)


def test_an_interrupted_folder_of_other_settings_is_refused(tmp_path, sources, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(collage, "make_collage", stop)
        write_collages(tmp_path, 2, sources, config=SMALL)
    with pytest.raises(ValueError, match="another seed or configuration"):
        write_collages(tmp_path, 2, sources, seed=1, config=SMALL)
    assert len(json.loads(write_collages(tmp_path, 2, sources, config=SMALL).read_text())["images"]) == 2


def test_bad_input_is_one_line(tmp_path, sources, monkeypatch, capsys):
    for text in ("a.json", "a.json,b,c", "a,b,cut,d"):
        with pytest.raises(ValueError, match="write ANNOTATIONS,IMAGES"):
            parse_source(text)
    with pytest.raises(FileNotFoundError, match=r"missing\.json"):
        write_collages(tmp_path, 1, [CollageSource(str(tmp_path / "missing.json"), str(tmp_path))])
    empty = write_coco(tmp_path, "empty", [])
    with pytest.raises(ValueError, match=r"no entity to cut out in .*empty\.json"):
        write_collages(tmp_path / "out", 1, [CollageSource(empty, str(tmp_path))])
    for name, value in (("long_side", (9, 9)), ("entities", (3, 2)), ("textured", 1.5)):
        with pytest.raises(ValueError, match=f"^{name}"):
            dataclasses.replace(SMALL, **{name: value})
    monkeypatch.setattr("sys.argv", ["collage", "--out", str(tmp_path / "o"), "--count", "1", "--source", "nothing"])
    with pytest.raises(SystemExit, match="error: --source 'nothing'"):
        collage.main()
