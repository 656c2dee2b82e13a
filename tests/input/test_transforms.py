import json

import numpy as np
import pytest
from PIL import Image

from esg_jax.input import transforms
from esg_jax.input.mappers import EntityCrop
from esg_jax.input.records import Entities, Record


class ArrayRecord(Record):
    """A record held in memory."""

    def __init__(self, image, masks, crowd=None):
        super().__init__(b"", "array", 0, *image.shape[:2])
        object.__setattr__(self, "pixels", image)
        layers = [mask.astype(np.int32) * (k + 1) for k, mask in enumerate(masks)]
        crowd = np.zeros(len(masks), bool) if crowd is None else np.asarray(crowd)
        entities = Entities(
            layers=layers, ids=tuple(range(len(masks))), labels=np.arange(len(masks), dtype=np.int32), crowd=crowd
        )
        object.__setattr__(self, "entities", entities)

    def load_image(self):
        return self.pixels

    def load_entities(self):
        return self.entities


def unpack(masks, width):
    return np.unpackbits(masks, axis=-1)[..., :width]


def test_nearest_indices_are_those_of_pil():
    rng = np.random.default_rng(0)
    sizes = [(1, 1), (1, 7), (7, 1), (2200, 800), (1333, 1999), (90, 62)]
    sizes += [tuple(rng.integers(1, 2500, 2)) for _ in range(300)]
    for size, new_size in sizes:
        line = np.arange(size, dtype=np.int32)[None]
        expected = np.asarray(Image.fromarray(line).resize((int(new_size), 1), Image.Resampling.NEAREST))[0]
        np.testing.assert_array_equal(transforms.nearest_indices(int(size), int(new_size)), expected)


def test_shortest_edge():
    assert transforms.shortest_edge_size(480, 640, 800, 1333) == (800, 1067)
    assert transforms.shortest_edge_size(640, 480, 800, 1333) == (1067, 800)
    assert transforms.shortest_edge_size(100, 400, 800, 1333) == (333, 1333)
    assert transforms.shortest_edge_size(1, 5000, 800, 1333) == (1, 1333)
    assert transforms.shortest_edge_size(1, 1, 800, 1333) == (800, 800)


def test_corner_boxes_truncate_in_double_precision():
    # 0.7 * 90 is 62.99999999999999
    expected = [[0, 0, 91, 62], [40, 0, 131, 62], [0, 28, 91, 90], [40, 28, 131, 90]]
    np.testing.assert_array_equal(transforms.corner_boxes(90, 131), expected)
    np.testing.assert_array_equal(transforms.corner_boxes(1, 1), [[0, 0, 1, 1]] * 4)


def test_resizing_commutes_with_flipping():
    rng = np.random.default_rng(1)
    for _ in range(60):
        old, new = rng.integers(1, 200, (2, 2))
        old = rng.choice([old, 2 * new, 3 * new])
        image = rng.integers(0, 256, (*old, 3), dtype=np.uint8)
        flipped = transforms.resize_image(np.ascontiguousarray(image[:, ::-1]), tuple(new))
        np.testing.assert_array_equal(transforms.resize_image(image, tuple(new))[:, ::-1], flipped)


def test_flipped_crop_equals_flip_then_crop():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (50, 71, 3), dtype=np.uint8)
    labels = rng.integers(0, 9, (50, 71))
    view = transforms.crop_view(50, 71, 2, 33, 100, flip=True)
    x0, y0, x1, y1 = view.box
    expected = transforms.resize_image(np.ascontiguousarray(image[:, ::-1][y0:y1, x0:x1]), view.size)
    np.testing.assert_array_equal(transforms.view_image(image, view), expected)
    flipped = Image.fromarray(labels[:, ::-1][y0:y1, x0:x1].astype(np.uint8))
    expected = np.asarray(flipped.resize(view.size[::-1], Image.Resampling.NEAREST))
    np.testing.assert_array_equal(transforms.view_labels(labels, view), expected)
    np.testing.assert_array_equal(transforms.view_labels(np.asfortranarray(labels), view), expected)


@pytest.mark.parametrize("item", [0, 1])
def test_crop_mapper_equals_the_reference_loader(shared, item):
    data = np.load(shared("fixtures", "cropformer", "train_dev.npz"))
    get = lambda name: data[f"input/item{item}/{name}"]  # noqa: E731
    masks = get("original_masks")
    record = ArrayRecord(get("original_image_rgb_uint8"), masks)
    max_size = json.loads(str(data["input/config_json"]))["data"]["max_size_train"]
    mapper = EntityCrop((1,), max_size, (96, 96), max_entities=10)
    example = mapper.build(record, bool(get("flip")), int(get("short_edge")[0]), int(get("crop_index")[0]))
    n = len(masks)
    for t, (image, name) in enumerate([(get("image"), "full"), (get("image_crop")[0], "crop")]):
        height, width = image.shape[1:]
        np.testing.assert_array_equal(example["size"][t], [height, width])
        np.testing.assert_array_equal(example["image"][t, :height, :width], image.transpose(1, 2, 0))
        assert not example["image"][t, height:].any() and not example["image"][t, :, width:].any()
        unpacked = unpack(example["masks"][:n, t], 96)
        np.testing.assert_array_equal(unpacked[:, :height, :width], get(f"gt_masks_{name}"))
        assert not unpacked[:, height:].any() and not unpacked[:, :, width:].any()
        np.testing.assert_array_equal(example["valid"][:n, t], get(f"gt_valid_{name}").astype(bool))
    np.testing.assert_array_equal(example["present"], np.arange(10) < n)
    assert not example["valid"][n:].any() and not example["labels"].any()


def test_inference_views_equal_the_reference_loader(shared):
    data = np.load(shared("fixtures", "cropformer", "infer_dev.npz"))
    config = json.loads(str(data["input/config_json"]))["data"]
    pixels, sizes, boxes = transforms.inference_views(
        data["input/original_image_rgb_uint8"],
        short_edge=config["min_size_test"],
        max_size=config["max_size_test"],
    )
    assert pixels.shape == (5, 64, 96, 3)
    expected = [data["input/image"], *data["input/image_crop"]]
    for t, view in enumerate(expected):
        height, width = view.shape[1:]
        np.testing.assert_array_equal(sizes[t], [height, width])
        np.testing.assert_array_equal(pixels[t, :height, :width], view.transpose(1, 2, 0))
    np.testing.assert_array_equal(boxes[1:], data["input/crop_region"])
    np.testing.assert_array_equal(boxes[0], [0, 0, 131, 90])


def test_inference_views_of_one_pixel_and_wrong_requests():
    pixels, sizes, boxes = transforms.inference_views(np.full((1, 1, 3), 7, np.uint8), short_edge=32, max_size=64)
    assert pixels.shape == (5, 32, 32, 3) and (pixels == 7).all() and (boxes == [0, 0, 1, 1]).all()
    with pytest.raises(ValueError, match="num_views is 3"):
        transforms.inference_views(np.zeros((4, 4, 3), np.uint8), num_views=3)
    with pytest.raises(ValueError, match="larger than the padded size"):
        transforms.inference_views(np.zeros((40, 80, 3), np.uint8), short_edge=32, padded=(32, 32))
