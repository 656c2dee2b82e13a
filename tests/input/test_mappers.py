import numpy as np
import pytest
from PIL import Image

from esg_jax.input import augment, mappers
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


def unpacked(example):
    return np.unpackbits(example["masks"], axis=-1).astype(bool)


# Crops of the second window would be a pixel wider than those of the picture.
@pytest.mark.parametrize(
    ("window", "crop"), [((21, 15, 63, 45), True), ((-42, -30, 126, 90), False), ((30, -10, 114, 50), True)]
)
@pytest.mark.parametrize("flip", [False, True])
def test_views_of_a_window_are_the_views_of_that_picture(window, crop, flip):
    """Against a record that has been cut or surrounded beforehand."""
    record = GridRecord(3, 4)
    x0, y0, x1, y1 = window
    pad = [(100, 100), (100, 100)]
    labels = np.pad(record.entities.layers[0], pad)[100 + y0 : 100 + y1, 100 + x0 : 100 + x1]
    pixels = np.pad(record.pixels, [*pad, (0, 0)], constant_values=128)[100 + y0 : 100 + y1, 100 + x0 : 100 + x1]
    cut = GridRecord(3, 4)
    cut.entities.layers[0] = labels
    object.__setattr__(cut, "pixels", pixels)
    object.__setattr__(cut, "height", y1 - y0)
    object.__setattr__(cut, "width", x1 - x0)
    mapper = crop_mapper(max_entities=12, class_agnostic=False, crop=crop)
    seen = mapper.build(record, flip, 48, 1, window)
    expected = mapper.build(cut, flip, 48, 1)
    np.testing.assert_array_equal(seen["image"], expected["image"])
    np.testing.assert_array_equal(seen["size"], expected["size"])
    # What no view shows is no target here.
    shown = expected["valid"].any(1)
    assert seen["present"].sum() == shown.sum()
    np.testing.assert_array_equal(seen["labels"][seen["present"]], expected["labels"][shown])
    np.testing.assert_array_equal(unpacked(seen)[seen["present"]], unpacked(expected)[shown])


def test_the_largest_in_the_window_are_kept():
    record = GridRecord(1, 4)  # four columns of 21 pixels
    example = crop_mapper(max_entities=2, class_agnostic=False).build(record, False, 48, 0, (10, 0, 52, 30))
    np.testing.assert_array_equal(example["labels"], [10, 11])  # 11, 21 and 10 columns of them


def test_zoom_keeps_the_sizes_of_views():
    """Whatever the window's rounding does to its aspect: the bucket was chosen for the whole picture."""
    mapper, plain = crop_mapper(zoom=(0.4, 3.0)), crop_mapper()
    magnifications = []
    for seed in range(40):
        rng, again = (np.random.default_rng(seed) for _ in range(2))
        example = mapper(GridRecord(2, 2), rng)
        np.testing.assert_array_equal(example["size"], plain(GridRecord(2, 2), again)["size"])
        assert example["present"].any()
        box = augment.random_window(again, HEIGHT, WIDTH, (0.4, 3.0))
        magnifications.append(WIDTH / (box[2] - box[0]))
        assert box[0] >= 0 and box[2] <= WIDTH if magnifications[-1] >= 1 else box[0] <= 0 and box[2] >= WIDTH
        assert abs((box[2] - box[0]) / WIDTH - (box[3] - box[1]) / HEIGHT) < 0.03
    assert min(magnifications) < 0.6 and max(magnifications) > 2


def test_colour_is_the_same_in_all_views_and_leaves_masks_and_padding():
    record = GridRecord(1, 1)
    record.pixels[:] = (200, 100, 50)
    plain = crop_mapper()(record, np.random.default_rng(3))
    seen = set()
    for seed in range(20):
        example = crop_mapper(colour=1.0)(record, np.random.default_rng(seed))
        inside = [view[: size[0], : size[1]] for view, size in zip(example["image"], example["size"], strict=True)]
        colours = {tuple(pixel) for view in inside for pixel in np.unique(view.reshape(-1, 3), axis=0).tolist()}
        assert len(colours) == 1
        seen |= colours
        assert not example["image"][0, example["size"][0, 0] :].any()
    assert len(seen) > 12
    np.testing.assert_array_equal(plain["masks"], crop_mapper(colour=1.0)(record, np.random.default_rng(3))["masks"])


def test_colour_matrices_against_their_definition():
    identity = augment.random_colour_matrix(np.random.default_rng(0), 0.0)
    np.testing.assert_allclose(identity, np.eye(3, 4), atol=1e-12)
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3)).astype(np.uint8)
    np.testing.assert_array_equal(augment.change_colour(image, identity), image)
    for seed in range(200):
        matrix = augment.random_colour_matrix(np.random.default_rng(seed), 1.0)
        # Gray stays gray, saturation and hue do not touch it.
        gray = matrix @ [100, 100, 100, 1]
        np.testing.assert_allclose(gray, gray[0])
        contrast = matrix[:, :3].sum(1)[0]
        assert 0.5 <= contrast <= 1.5 and abs(matrix[0, 3]) <= 32 * max(contrast, 1)
        turned = np.round(np.clip(image.reshape(-1, 3) @ matrix[:, :3].T + matrix[:, 3], 0, 255))
        changed = augment.change_colour(image, matrix).reshape(-1, 3)
        assert np.abs(changed - turned).max() <= 1
    # A third of a turn takes red to green to blue.
    np.testing.assert_allclose(augment._turn(2 * np.pi / 3), np.eye(3)[[2, 0, 1]], atol=1e-12)


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
