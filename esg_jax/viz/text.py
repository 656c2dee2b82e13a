"""Small text on images, in the font that ships with Pillow."""

import functools

from PIL import Image, ImageDraw, ImageFont


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The same font on every machine; `size` in pixels."""
    return ImageFont.load_default(size)


def text_size(text: str, size: int) -> tuple[int, int]:
    """(width, height) in pixels of one line, without the space below the baseline."""
    left, top, right, bottom = font(size).getbbox(text or " ", anchor="ls")
    return int(right - left + 1), int(bottom - top + 1)


def fit_text(text: str, size: int, width: int) -> str:
    """`text`, shortened with an ellipsis until it is at most `width` pixels wide."""
    if text_size(text, size)[0] <= width:
        return text
    while text and text_size(text + "…", size)[0] > width:
        text = text[:-1]
    return text.rstrip() + "…"


def draw_tag(image: Image.Image, center: tuple[float, float], text: str, size: int) -> None:
    """White text on a dark, rounded, translucent plate centred at (x, y); `image` is RGB and changed in place."""
    box = tag_box(center, text, size, image.size)
    x0, y0, x1, y1 = box
    plate = image.crop(box)
    mask = Image.new("L", (4 * (x1 - x0), 4 * (y1 - y0)), 0)  # drawn larger, for smooth corners
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, mask.width - 1, mask.height - 1), radius=mask.height / 3, fill=165)
    mask = mask.resize(plate.size, Image.Resampling.BOX)
    image.paste(Image.composite(Image.new("RGB", plate.size, (15, 15, 20)), plate, mask), (x0, y0))
    draw = ImageDraw.Draw(image)
    draw.text(((x0 + x1) / 2, (y0 + y1) / 2), text, fill=(255, 255, 255), font=font(size), anchor="mm")


def tag_box(center: tuple[float, float], text: str, size: int, bounds: tuple[int, int]) -> tuple[int, int, int, int]:
    """(x0, y0, x1, y1) of the plate of `draw_tag`, moved inside an image of (width, height) `bounds`."""
    width, height = text_size(text, size)
    width, height = width + round(0.6 * size), height + round(0.6 * size)
    x0 = min(max(0, round(center[0] - width / 2)), max(0, bounds[0] - width))
    y0 = min(max(0, round(center[1] - height / 2)), max(0, bounds[1] - height))
    return x0, y0, x0 + width, y0 + height
