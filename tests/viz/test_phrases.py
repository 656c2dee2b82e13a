import numpy as np
import pytest

from esg_jax.viz.palette import palette
from esg_jax.viz.phrases import phrase_picture

TEXT = "A man walks two dogs, and a unicorn follows the man."
PHRASES = [
    ("man", (2, 5), (0,)), ("two dogs", (12, 20), (1, 2)), ("unicorn", (28, 35), ()), ("rug", None, (3,)),
]  # fmt: skip


@pytest.fixture
def label_map():
    labels = np.zeros((80, 120), np.int32)
    labels[:40], labels[40:, :40], labels[40:, 40:80], labels[60:, 90:] = 1, 2, 3, 4
    return labels


def color_near(pixels, color):
    return (np.abs(pixels.astype(int) - color).max(-1) <= 4).any()


def test_masks_and_words_share_a_colour(label_map):
    image = np.full((*label_map.shape, 3), 128, np.uint8)
    picture = phrase_picture(image, label_map, TEXT, PHRASES)
    height = 160  # small images are drawn at twice their size
    photo, panel = picture[:height], picture[height:]
    assert picture.shape[1] == 240 and len(panel) > 20
    colors = palette()[[0, 7, 4, 1]].astype(int)
    for (_, _, entities), color in zip(PHRASES, colors, strict=True):
        assert color_near(panel, color) == bool(entities)
        mixed = (128 + color) / 2
        for entity in entities:
            rows, columns = np.nonzero(label_map == entity + 1)
            middle = photo[2 * rows.min() + 4 : 2 * rows.max() - 4, 2 * columns.min() + 4 : 2 * columns.max() - 4]
            assert color_near(middle, mixed.astype(int))
    assert not color_near(photo, ((128 + colors[2]) / 2).astype(int))  # nothing is tinted for what was not found


def test_long_text_wraps_and_repeats_are_written_once(label_map):
    image = np.full((*label_map.shape, 3), 128, np.uint8)
    short, long = (phrase_picture(image, label_map, TEXT * n, []) for n in (1, 4))
    assert len(long) > len(short) and long.shape[1] == short.shape[1]
    twice = [("man", (2, 5), (0,)), ("man", (2, 5), (0,))]
    assert phrase_picture(image, label_map, TEXT, twice).shape[1] == 240


def test_sizes_must_agree(label_map):
    with pytest.raises(ValueError, match="differ in size"):
        phrase_picture(np.zeros((8, 8, 3), np.uint8), label_map, "", [])
