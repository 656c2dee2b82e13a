import json

import numpy as np
import pytest
from PIL import Image

from esg_jax.input.image_io import ImageError
from esg_jax.input.readers import SourceConfig, open_source, register_reader
from esg_jax.masks import rle

LABELS = np.array([[1, 1, 2, 2, 0], [1, 3, 3, 2, 0], [3, 3, 3, 2, 2], [3, 0, 0, 0, 2]])


@pytest.fixture
def coco(tmp_path):
    """Writes a two-image COCO file after `change(content)`; gives its SourceConfig."""

    def write(change=lambda content: None):
        for name in ("a.png", "b.png"):
            Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(tmp_path / name)
        rles = [rle.to_json(code) for code in rle.encode_labels(LABELS, 3)]
        uncompressed = {"size": [4, 5], "counts": rle.runs_of(rles[1], (4, 5)).tolist()}
        content = {
            "images": [
                {"id": 7, "file_name": "a.png", "height": 4, "width": 5},
                {"id": 9, "file_name": "b.png", "height": 4, "width": 5},
            ],
            "annotations": [
                {"id": 1, "image_id": 7, "category_id": 30, "segmentation": rles[0], "iscrowd": 0},
                {"id": 2, "image_id": 7, "category_id": 10, "segmentation": uncompressed},
                {"id": 3, "image_id": 7, "category_id": 30, "segmentation": rles[2], "iscrowd": 1},
            ],
            "categories": [{"id": 30, "name": "cup"}, {"id": 10, "name": "bed"}],
        }
        change(content)
        (tmp_path / "coco.json").write_text(json.dumps(content))
        return SourceConfig(annotations=str(tmp_path / "coco.json"))

    return write


def test_coco_instances(coco):
    source = open_source(coco())
    assert len(source) == 2 and source.categories == ("bed", "cup")
    np.testing.assert_array_equal(source.num_entities, [2, 0])
    np.testing.assert_array_equal(source.sizes, [[4, 5], [4, 5]])
    record = source[0]
    assert (record.image_id, record.name, record.height, record.width) == (7, "a.png", 4, 5)
    assert record.load_image().shape == (4, 5, 3)
    entities = record.load_entities()
    np.testing.assert_array_equal(entities.layers[0], LABELS)
    np.testing.assert_array_equal(entities.labels, [1, 0, 1])
    np.testing.assert_array_equal(entities.crowd, [False, False, True])
    np.testing.assert_array_equal(entities.areas, np.bincount(LABELS.ravel())[1:])
    np.testing.assert_array_equal(entities.mask(1), LABELS == 2)
    assert entities.ids == (1, 2, 3)
    empty = source[1].load_entities()
    assert empty.layers == [] and len(empty.labels) == 0 and empty.areas.shape == (0,)


def drop(key):
    return lambda content: content.pop(key)


def set_in(group, index, key, value):
    return lambda content: content[group][index].__setitem__(key, value)


@pytest.mark.parametrize(
    "change,message",
    [
        (drop("annotations"), "no list 'annotations'"),
        (drop("images"), "no list 'images'"),
        (drop("categories"), "no list 'categories'"),
        (set_in("annotations", 0, "image_id", 99), "annotation 1 belongs to image id 99"),
        (set_in("annotations", 1, "category_id", 4), "annotation 2 has category id 4"),
        (set_in("annotations", 0, "segmentation", {"size": [5, 4]}), r"annotation 1 has an RLE of size \[5, 4\]"),
        (set_in("images", 1, "id", 7), "image id 7 is used twice"),
        (lambda content: content["annotations"][2].pop("segmentation"), "annotation 3 has no 'segmentation'"),
        (lambda content: content["images"][0].pop("height"), "image 7 has no 'height'"),
    ],
)  # fmt: skip
def test_malformed_files_are_refused_with_file_and_id(coco, change, message):
    with pytest.raises(ValueError, match="coco.json.*" + message):
        open_source(coco(change))


def test_broken_runs_are_named_when_decoded(coco):
    change = set_in("annotations", 1, "segmentation", {"size": [4, 5], "counts": [3, 4]})
    with pytest.raises(ValueError, match="annotation 2 of image a.png: RLE runs fill 7 pixels, the image has 20"):
        open_source(coco(change))[0].load_entities()


def test_missing_and_wrong_files(coco, tmp_path):
    with pytest.raises(FileNotFoundError, match="none.json"):
        open_source(SourceConfig(annotations=str(tmp_path / "none.json")))
    with pytest.raises(ValueError, match="annotations is empty"):
        open_source(SourceConfig())
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="bad.json is not valid JSON"):
        open_source(SourceConfig(annotations=str(tmp_path / "bad.json")))
    config = coco()
    with pytest.raises(FileNotFoundError, match="image folder not found"):
        open_source(SourceConfig(annotations=config.annotations, images=str(tmp_path / "nowhere")))
    source = open_source(config)
    (tmp_path / "b.png").unlink()
    with pytest.raises(FileNotFoundError, match="b.png"):
        source[1].load_image()
    (tmp_path / "a.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(ImageError, match="a.png"):
        source[0].load_image()
    Image.fromarray(np.zeros((5, 4, 3), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png .id 7. is 5x4 pixels, its annotations say 4x5"):
        source[0].load_image()


@pytest.fixture
def panoptic(tmp_path):
    def write(segment_ids=(5, 300, 70000)):
        ids = np.array([0, 5, 300, 70000])[LABELS]
        rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
        (tmp_path / "panoptic").mkdir(exist_ok=True)
        Image.fromarray(rgb).save(tmp_path / "panoptic" / "a.png")
        Image.fromarray(rgb).save(tmp_path / "a.jpg")
        segments = [{"id": i, "category_id": 3 + (i > 5), "iscrowd": int(i == 300)} for i in segment_ids]
        content = {
            "images": [{"id": 1, "file_name": "a.jpg", "height": 4, "width": 5}],
            "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": segments}],
            "categories": [{"id": 3, "name": "sky"}, {"id": 4, "name": "car"}],
        }
        (tmp_path / "panoptic.json").write_text(json.dumps(content))
        return SourceConfig("coco_panoptic", str(tmp_path / "panoptic.json"))

    return write


def test_coco_panoptic(panoptic):
    source = open_source(panoptic())
    np.testing.assert_array_equal(source.num_entities, [2])
    entities = source[0].load_entities()
    np.testing.assert_array_equal(entities.layers[0], LABELS)
    np.testing.assert_array_equal(entities.labels, [0, 1, 1])
    np.testing.assert_array_equal(entities.crowd, [False, True, False])


def test_panoptic_segment_order_is_kept(panoptic):
    entities = open_source(panoptic((70000, 5, 300)))[0].load_entities()
    np.testing.assert_array_equal(entities.layers[0], np.array([0, 2, 3, 1])[LABELS])


@pytest.mark.parametrize(
    "ids,message", [((5, 300), "id 70000 is in the PNG"), ((5, 300, 70000, 8), "no pixel has .* 8")]
)
def test_panoptic_ids_must_agree(panoptic, ids, message):
    with pytest.raises(ValueError, match="a.png.*" + message):
        open_source(panoptic(ids))[0].load_entities()


def test_instance_json_given_to_the_panoptic_reader(coco, tmp_path):
    config = coco()
    with pytest.raises(ValueError, match="has no list 'segments_info'"):
        open_source(SourceConfig("coco_panoptic", config.annotations, masks=str(tmp_path)))


def test_panoptic_png_of_another_size(panoptic, tmp_path):
    source = open_source(panoptic())
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / "panoptic" / "a.png")
    with pytest.raises(ValueError, match="a.png is 2x2 pixels, image a.jpg is 4x5"):
        source[0].load_entities()


def test_semantic_maps(tmp_path):
    (tmp_path / "maps").mkdir()
    Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(tmp_path / "a.png")
    values = np.array([255, 12, 0, 3], np.uint8)[LABELS]
    Image.fromarray(values).save(tmp_path / "maps" / "a.png")
    (tmp_path / "list.txt").write_text("a.png a.png\n\n")
    source = open_source(SourceConfig("semantic_maps", str(tmp_path / "list.txt"), masks=str(tmp_path / "maps")))
    assert len(source) == 1 and source.num_entities.tolist() == [-1] and source.sizes.tolist() == [[4, 5]]
    entities = source[0].load_entities()
    np.testing.assert_array_equal(entities.labels, [0, 3, 12])
    np.testing.assert_array_equal(entities.layers[0], np.array([0, 3, 1, 2])[LABELS])
    (tmp_path / "list.txt").write_text("only_one_name\n")
    with pytest.raises(ValueError, match="line 1"):
        open_source(SourceConfig("semantic_maps", str(tmp_path / "list.txt")))


def test_unknown_reader_and_double_registration():
    with pytest.raises(ValueError, match="unknown reader 'nope'; choose one of coco_instances"):
        open_source(SourceConfig(reader="nope"))
    with pytest.raises(ValueError, match="already registered"):
        register_reader("coco_instances")(object)


@pytest.mark.parametrize("split", ["train", "val"])
def test_entity_mini_decodes_without_overlap(shared, split):
    root = shared("realdata")
    source = open_source(SourceConfig(annotations=f"{root}/entity_mini/entity_{split}.json", images=str(root)))
    content = json.loads((root / "entity_mini" / f"entity_{split}.json").read_text())
    areas = {annotation["id"]: annotation["area"] for annotation in content["annotations"]}
    for index in range(0, len(source), 9):
        entities = source[index].load_entities()
        assert len(entities.layers) == 1 or entities.crowd.any()
        np.testing.assert_array_equal(entities.areas, [areas[i] for i in entities.ids])


def test_coco_panoptic_mini_areas(shared):
    root = shared("realdata", "coco_panoptic_mini")
    file = root / "annotations" / "panoptic_val2017.json"
    source = open_source(SourceConfig("coco_panoptic", str(file), images=str(root / "val2017")))
    annotations = json.loads(file.read_text())["annotations"]
    areas = {(a["image_id"], s["id"]): s["area"] for a in annotations for s in a["segments_info"]}
    for index in range(0, len(source), 13):
        record = source[index]
        entities = record.load_entities()
        np.testing.assert_array_equal(entities.areas, [areas[record.image_id, i] for i in entities.ids])
