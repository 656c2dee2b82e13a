import io

import numpy as np
import pytest
from PIL import Image

from esg_jax.input import image_io

RGB = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def encoded(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def test_png_is_exact_from_path_and_bytes(tmp_path):
    data = encoded(Image.fromarray(RGB), format="PNG")
    (tmp_path / "a.png").write_bytes(data)
    np.testing.assert_array_equal(image_io.load_image(tmp_path / "a.png"), RGB)
    np.testing.assert_array_equal(image_io.load_image(data), RGB)


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(RGB), format="PNG", exif=exif))
    np.testing.assert_array_equal(image_io.load_image(tmp_path / "a.png"), np.rot90(RGB, -1))
    assert image_io.image_size(tmp_path / "a.png") == (9, 6)


def test_alpha_is_dropped():
    rgba = np.dstack([RGB, np.zeros((6, 9), np.uint8)])
    np.testing.assert_array_equal(image_io.load_image(encoded(Image.fromarray(rgba), format="PNG")), RGB)


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_gray_modes_become_three_equal_channels(mode):
    image = Image.fromarray(RGB).convert("L").convert(mode)
    out = image_io.load_image(encoded(image, format="PNG"))
    np.testing.assert_array_equal(out, np.repeat(np.asarray(image.convert("L"))[..., None], 3, -1))


def test_palette_is_expanded():
    image = Image.fromarray(RGB).quantize(8)
    np.testing.assert_array_equal(image_io.load_image(encoded(image, format="PNG")), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("suffix", ["PNG", "TIFF"])
def test_16_bit_gray_is_scaled_not_clipped(suffix):
    gray = np.array([[0, 257, 65535, 32896]], np.uint16)
    out = image_io.load_image(encoded(Image.fromarray(gray), format=suffix))
    np.testing.assert_array_equal(out[..., 0], [[0, 1, 255, 128]])


def test_float_tiff_between_zero_and_one():
    out = image_io.load_image(encoded(Image.fromarray(np.array([[0, 0.5, 1]], np.float32)), format="TIFF"))
    np.testing.assert_array_equal(out[0, :, 0], [0, 128, 255])
    with pytest.raises(image_io.ImageError, match="0..1"):
        image_io.load_image(encoded(Image.fromarray(np.array([[0, 9.5]], np.float32)), format="TIFF"))


def test_one_pixel():
    assert image_io.load_image(encoded(Image.fromarray(RGB[:1, :1]), format="PNG")).shape == (1, 1, 3)


def test_missing_folder_empty_and_text_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.jpg"):
        image_io.load_image(tmp_path / "nothing.jpg")
    with pytest.raises(image_io.ImageError, match="is a folder"):
        image_io.load_image(tmp_path)
    for content in (b"", b"not an image at all"):
        (tmp_path / "bad.jpg").write_bytes(content)
        with pytest.raises(image_io.ImageError, match="bad.jpg"):
            image_io.load_image(tmp_path / "bad.jpg")


@pytest.mark.parametrize("suffix", ["JPEG", "PNG", "WEBP"])
def test_truncated_files_are_refused(tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(pixels), format=suffix)
    path = tmp_path / f"cut.{suffix.lower()}"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(image_io.ImageError, match="cut"):
        image_io.load_image(path)


def test_list_images(tmp_path):
    with pytest.raises(FileNotFoundError, match="no image in folder"):
        image_io.list_images(tmp_path)
    for name in ("b.PNG", "a.jpg", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in image_io.list_images(tmp_path)] == ["a.jpg", "b.PNG"]
    assert image_io.list_images(tmp_path / "a.jpg") == [tmp_path / "a.jpg"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        image_io.list_images(tmp_path / "nowhere")
