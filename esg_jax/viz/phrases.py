"""A picture with its text below; every phrase has the colour of the masks it means."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageDraw

from esg_jax.masks import BACKGROUND
from esg_jax.viz.overlay import overlay
from esg_jax.viz.palette import palette
from esg_jax.viz.text import font, text_size

# Of the text panel: paper, ink, and what was not found.
_PAPER, _INK, _GRAY = (250, 250, 248), (25, 25, 25), (150, 150, 150)


def phrase_picture(
    image_hw3: UInt8[np.ndarray, "h w 3"],
    label_map: Int[np.ndarray, "h w"],
    text: str,
    phrases: Sequence[tuple[str, tuple[int, int] | None, Sequence[int]]],
    *,
    max_side: int = 1600,
) -> UInt8[np.ndarray, "height width 3"]:
    """Draws phrases and the entities they mean in one colour each.

    An entity that several phrases mean takes the colour of the first. Phrases that were not found are struck through
    in gray; phrases that do not occur in the text literally are listed below it.

    Args:
        image_hw3: RGB.
        label_map: 0 where there is no entity, k + 1 for entity k.
        text: may be empty.
        phrases: text, (start, end) in `text` or None, and entities of every phrase.
        max_side: of the picture, in pixels; see `overlay`.

    Raises:
        ValueError: image and label map differ in size.
    """
    colors = _phrase_colors(len(phrases))
    owner = np.full(int(label_map.max(initial=BACKGROUND)) + 1, BACKGROUND)
    for number, (_, _, entities) in enumerate(phrases, start=1):
        for entity in entities:
            if owner[entity + 1] == BACKGROUND:
                owner[entity + 1] = number
    picture = overlay(
        image_hw3, owner[label_map], [phrase for phrase, _, _ in phrases], colors=colors, max_side=max_side
    )
    panel = _panel(_segments(text, phrases), palette()[colors], picture.shape[1])
    return np.concatenate([picture, panel])


def _phrase_colors(count: int) -> np.ndarray:
    """Palette entries; phrases that follow each other get hues far apart."""
    number = np.arange(count)
    return 7 * number % 10 + 10 * (number // 10 % 3)


def _segments(text: str, phrases) -> list[tuple[str, int | None, bool]]:
    """(text, phrase or None, found) pieces in reading order."""
    out: list[tuple[str, int | None, bool]] = []
    position = 0
    spans = sorted((span, number) for number, (_, span, _) in enumerate(phrases) if span)
    for (start, end), number in spans:
        if start < position:  # the same words twice
            continue
        out += [(text[position:start], None, True), (text[start:end], number, bool(len(phrases[number][2])))]
        position = end
    out.append((text[position:], None, True))
    shown = {number for _, number, _ in out}
    for number, (phrase, _, entities) in enumerate(phrases):
        if number not in shown:
            out += [("  ", None, True), (phrase, number, bool(len(entities)))]
    return [piece for piece in out if piece[0]]


def _panel(segments, colors: np.ndarray, width: int) -> np.ndarray:
    size = max(13, round(width / 55))
    margin, line = size, round(1.7 * size)
    words = [
        (word, number, found) for text, number, found in segments for word in text.replace("\n", " ").split(" ") if word
    ]
    space = text_size("a a", size)[0] - text_size("aa", size)[0]
    places, x, y = [], margin, margin
    for word, number, found in words:
        length = text_size(word, size)[0]
        # Punctuation stays with the word before it.
        gap = 0 if word[0] in ".,;:!?" and places else space
        if x + gap + length > width - margin and x > margin:
            x, y, gap = margin, y + line, 0
        x += gap if x > margin else 0
        places.append((word, number, found, x, y, length))
        x += length
    image = Image.new("RGB", (width, y + line + margin // 2), _PAPER)
    draw = ImageDraw.Draw(image)
    for word, number, found, x, y, length in places:
        ink = _INK
        if number is not None and found:
            color = tuple(int(value) for value in colors[number])
            draw.rounded_rectangle((x - 2, y - 2, x + length + 2, y + 1.35 * size), radius=size // 4, fill=color)
            ink = _INK if np.dot(color, (0.3, 0.59, 0.11)) > 110 else (255, 255, 255)
        elif number is not None:
            ink = _GRAY
            draw.line((x, y + 0.7 * size, x + length, y + 0.7 * size), fill=_GRAY, width=max(1, size // 12))
        draw.text((x, y), word, fill=ink, font=font(size))
    return np.asarray(image)
