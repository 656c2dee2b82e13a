import numpy as np
import pytest
from PIL import Image

from data.leaks import find_leaks


@pytest.fixture
def pictures(tmp_path):
    """Three unrelated photographs of smooth noise."""
    rng = np.random.default_rng(0)

    def save(name, image):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
        return tmp_path / f"{name}.png"

    small = rng.integers(0, 256, (3, 24, 30, 3)).astype(np.uint8)
    images = [np.asarray(Image.fromarray(image).resize((300, 240), Image.Resampling.BICUBIC)) for image in small]
    return images, save


def test_copies_crops_and_mirrored_crops_are_found(pictures):
    (first, second, third), save = pictures
    held_out = {"one": save("one", first), "two": save("two", second)}
    training = {
        "copy": save("copy", first),
        "crop": save("crop", first[37:150, 81:200]),
        "mirrored": save("mirrored", second[11:200, 5:250][:, ::-1]),
        "pasted": save("pasted", np.concatenate([third[:, :150], second[:, 150:]], 1)),
        "other": save("other", third),
    }
    assert find_leaks(training, held_out) == [("copy", "one"), ("crop", "one"), ("mirrored", "two"), ("pasted", "two")]


def test_plain_surfaces_and_tiny_pictures_are_no_evidence(pictures):
    _, save = pictures
    sky = np.full((100, 100, 3), 230, np.uint8)
    held_out = {"sky": save("sky", sky), "tiny": save("tiny", np.zeros((9, 300, 3), np.uint8))}
    assert find_leaks({"same": save("same", sky), "small": save("small", sky[:5])}, held_out) == []
