"""Any image file to RGB uint8, or one clear error that names the file."""

import io
from pathlib import Path

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image, ImageOps

# A file, or RGB pixels.
ImageLike = str | Path | UInt8[np.ndarray, "h w 3"]
IMAGE_SUFFIXES = frozenset(Image.registered_extensions()) - {".pdf", ".mpg", ".mpeg"}


class ImageError(ValueError):
    """A file that exists but cannot be read as an image."""


def load_image(source: str | Path | bytes, name: str | None = None) -> UInt8[np.ndarray, "height width 3"]:
    """Decodes an image file, or its encoded bytes, into RGB 0..255.

    The EXIF orientation is applied. An alpha channel is dropped, as the reference implementation does. Grayscale and
    palette images are expanded to RGB. 16-bit images are scaled from 0..65535 to 0..255; floating-point images must
    hold values in 0..1. Of an animation, the first frame is read.

    Args:
        source: a path, or encoded bytes.
        name: how error messages call the image; the path by default.

    Raises:
        FileNotFoundError: there is no such file.
        ImageError: the file is empty, truncated, corrupt or no image.
    """
    name = name or (f"{len(source)} bytes" if isinstance(source, bytes) else str(source))
    if isinstance(source, bytes):
        stream = io.BytesIO(source)
    else:
        path = Path(source)
        if not path.exists():
            raise FileNotFoundError(f"image file not found: {name}")
        if path.is_dir():
            raise ImageError(f"{name} is a folder, expected an image file")
        stream = io.BytesIO(path.read_bytes())
    try:
        with Image.open(stream) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    # Decoders report broken data as OSError, SyntaxError, struct.error, EOFError, ValueError and more.
    except Exception as error:
        raise ImageError(f"cannot read image {name}: {error}") from error


def load_label_map(path: str | Path) -> Integer[np.ndarray, "height width"]:
    """Gray or palette values of a single-channel label map, unscaled.

    Raises:
        FileNotFoundError: there is no such file.
        ImageError: the file is corrupt, or has colour channels.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"label map not found: {path}")
    try:
        with Image.open(path) as image:
            values = np.asarray(image)
    except Exception as error:
        raise ImageError(f"cannot read label map {path}: {error}") from error
    if values.ndim != 2:
        raise ImageError(f"label map {path} has {values.shape[-1]} channels, expected one")
    return values.astype(np.int64)


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) in pixels after EXIF rotation, from the header only.

    Raises:
        FileNotFoundError, ImageError: as `load_image`.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"image file not found: {path}")
    try:
        with Image.open(path) as image:
            width, height = image.size
            orientation = image.getexif().get(0x0112, 1)
    except Exception as error:
        raise ImageError(f"cannot read image {path}: {error}") from error
    return (width, height) if orientation >= 5 else (height, width)


def size_of(image: ImageLike) -> tuple[int, int]:
    """(height, width) of a file, as `image_size`, or of an array.

    Raises:
        FileNotFoundError, ImageError: as `load_image`.
        ValueError: an array of another shape or type.
    """
    if not isinstance(image, np.ndarray):
        return image_size(image)
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ValueError(f"expected an RGB uint8 array (height, width, 3), got {image.dtype} {image.shape}")
    return image.shape[:2]


def pixels_of(image: ImageLike) -> UInt8[np.ndarray, "h w 3"]:
    """The array itself, or what `load_image` reads."""
    return image if isinstance(image, np.ndarray) else load_image(image)


def list_images(path: str | Path) -> list[Path]:
    """The image itself, or the images directly in a folder in name order.

    Raises:
        FileNotFoundError: no such path, or a folder without any image.
    """
    path = Path(path)
    if path.is_dir():
        images = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in IMAGE_SUFFIXES)
        if not images:
            raise FileNotFoundError(f"no image in folder {path} (looked for .jpg, .png, .webp, .tif and the like)")
        return images
    if not path.exists():
        raise FileNotFoundError(f"image file or folder not found: {path}")
    return [path]


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # "I;16" and relatives, or 32-bit integers holding 16-bit data
        gray = np.asarray(image).astype(np.int64)
        if gray.min() < 0 or gray.max() > 65535:
            raise ValueError(f"integer pixels range from {gray.min()} to {gray.max()}, expected 0..65535")
        gray = ((gray + 128) // 257).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=-1)
    if image.mode == "F":
        gray = np.asarray(image)
        if not (np.isfinite(gray).all() and gray.min() >= 0 and gray.max() <= 1):
            raise ValueError("floating-point pixels must lie in 0..1; convert the image to 8 or 16 bits")
        return np.repeat(np.round(gray * 255).astype(np.uint8)[..., None], 3, axis=-1)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
