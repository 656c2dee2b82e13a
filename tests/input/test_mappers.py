import numpy as np
import pytest
from PIL import Image

from esg_jax.input import mappers
from esg_jax.input.records import Entities, Record

HEIGHT, WIDTH = 60, 84


class GridRecord(Record):
    """Entity k is the k-th cell of a grid; with the crowd flags given."""

    def __init__(self, rows, columns, crowd=None):
        super().__init__(b"", "grid", 0, HEIGHT, WIDTH)
        cell = np.arange(HEIGHT)[:, None] * rows // HEIGHT * columns + np.arange(WIDTH) * columns // WIDTH
        count = rows * columns
        crowd = np.zeros(count, bool) if crowd is None else crowd
        labels = np.arange(count, dtype=np.int32) + 10
        entities = Entities(layers=[cell + 1], ids=tuple(range(count)), labels=labels, crowd=crowd)
        object.__setattr__(self, "entities", entities)
        gray = (cell * 255 // max(count - 1, 1)).astype(np.uint8)
        object.__setattr__(self, "pixels", np.repeat(gray[..., None], 3, -1))

    def load_image(self):
        return self.pixels

    def load_entities(self):
        return self.entities


def crop_mapper(**changes):
    fields = {"short_edges": (48,), "max_size": 80, "padded": (64, 96), "max_entities": 8}
    return mappers.EntityCrop(**{**fields, **changes})


def test_labels_follow_the_class_switch_and_crowds_are_dropped():
    record = GridRecord(2, 2, crowd=np.array([False, True, False, False]))
    example = crop_mapper(class_agnostic=False).build(record, False, 48, 0)
    np.testing.assert_array_equal(example["labels"], [10, 12, 13, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(example["present"], [1, 1, 1, 0, 0, 0, 0, 0])
    assert not crop_mapper().build(record, False, 48, 0)["labels"].any()


def test_entities_beyond_the_slots_lose_the_smallest():
    record = GridRecord(1, 4)
    record.entities.layers[0][:, 30:40] = 4  # the second cell shrinks, the fourth grows
    example = crop_mapper(max_entities=3, class_agnostic=False).build(record, False, 48, 0)
    np.testing.assert_array_equal(example["labels"], [10, 12, 13])


def test_entity_outside_the_crop_stays_present_but_not_valid():
    example = crop_mapper().build(GridRecord(1, 8), False, 48, 0)  # crop: left 70 percent
    assert example["present"].all() and example["valid"][:, 0].all()
    np.testing.assert_array_equal(example["valid"][:, 1], [1, 1, 1, 1, 1, 1, 0, 0])


def test_no_entities():
    record = GridRecord(1, 1, crowd=np.array([True]))
    for mapper in (crop_mapper(), mappers.LargeScaleJitter(64, 8)):
        example = mapper(record, np.random.default_rng(0))
        assert not example["present"].any() and not example["valid"].any() and not example["masks"].any()


def test_whole_image_only():
    example = crop_mapper(crop=False)(GridRecord(2, 2), np.random.default_rng(0))
    assert example["image"].shape == (1, 64, 96, 3) and example["masks"].shape == (8, 1, 64, 12)
    assert example["valid"].shape == (8, 1)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("scale,offset", [(0.3, 0.5), (1.0, 0.0), (2.0, 0.37), (1.7, 1.0)])
def test_jitter_equals_resize_then_crop_then_pad(flip, scale, offset):
    crop = 64
    record = GridRecord(3, 4)
    example = mappers.LargeScaleJitter(crop, 12, class_agnostic=False).build(record, flip, scale, offset)
    factor = min(crop * scale / HEIGHT, crop * scale / WIDTH)
    size = np.round(np.array([HEIGHT, WIDTH]) * factor).astype(int)
    pixels, labels = record.pixels, record.entities.layers[0].astype(np.uint8)
    if flip:
        pixels, labels = pixels[:, ::-1], labels[:, ::-1]
    pixels = np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR))
    labels = np.asarray(Image.fromarray(labels).resize(size[::-1], Image.Resampling.NEAREST))
    y, x = np.round(np.maximum(size - crop, 0) * offset).astype(int)
    pixels, labels = pixels[y : y + crop, x : x + crop], labels[y : y + crop, x : x + crop]
    expected = np.full((crop, crop, 3), 128, np.uint8)
    expected[: pixels.shape[0], : pixels.shape[1]] = pixels
    # The window is resized alone: rounding may differ by one level from resizing everything.
    assert np.abs(example["image"][0].astype(int) - expected).max() <= 1
    np.testing.assert_array_equal(example["size"], [[crop, crop]])
    seen = np.unique(labels)
    np.testing.assert_array_equal(example["labels"][: len(seen)], seen + 9)
    masks = np.unpackbits(example["masks"][:, 0], axis=-1)
    for k, value in enumerate(seen):
        expected_mask = np.zeros((crop, crop), bool)
        expected_mask[: labels.shape[0], : labels.shape[1]] = labels == value
        np.testing.assert_array_equal(masks[k], expected_mask)
    np.testing.assert_array_equal(example["present"], np.arange(12) < len(seen))
    np.testing.assert_array_equal(example["valid"][:, 0], example["present"])


def test_bucket_choice():
    buckets = ((64, 96), (96, 64), (96, 96))
    assert mappers.bucket_index([(60, 90), (61, 80)], buckets, "a") == 0
    assert mappers.bucket_index([(60, 90), (70, 80)], buckets, "a") == 2
    with pytest.raises(ValueError, match=r"photo.jpg needs a padded size of 60x97"):
        mappers.bucket_index([(60, 97)], buckets, "photo.jpg")


def test_inference_views_go_into_the_smallest_bucket():
    views = mappers.InferenceViews(5, 48, 80, buckets=((64, 96), (128, 128)))
    example = views(GridRecord(1, 2))
    assert example.image.shape == (5, 64, 96, 3) and example.size.shape == (5, 2) and example.boxes.shape == (5, 4)
