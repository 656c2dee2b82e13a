"""Silhouettes. Each takes a generator and a (width, height) in pixels and fills that box of an L mask with 255."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Size = tuple[int, int]


def canvas(size: Size) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("L", size, 0)
    return image, ImageDraw.Draw(image)


def _fill(draw: ImageDraw.ImageDraw, points_n2: np.ndarray, value: int = 255) -> None:
    draw.polygon([(float(x), float(y)) for x, y in points_n2], fill=value)


def _into_box(points_n2: np.ndarray, size: Size) -> np.ndarray:
    low, high = points_n2.min(0), points_n2.max(0)
    return (points_n2 - low) / np.maximum(high - low, 1e-6) * (np.array(size) - 1)


def _smooth(points_n2: np.ndarray, rounds: int = 3) -> np.ndarray:
    """Chaikin corner cutting of a closed polygon."""
    for _ in range(rounds):
        following = np.roll(points_n2, -1, axis=0)
        points_n2 = np.stack([0.75 * points_n2 + 0.25 * following, 0.25 * points_n2 + 0.75 * following], 1)
        points_n2 = points_n2.reshape(-1, 2)
    return points_n2


def _capsule(draw: ImageDraw.ImageDraw, start: np.ndarray, end: np.ndarray, width0: float, width1: float) -> None:
    """A limb: two discs and the quadrilateral between them."""
    direction = end - start
    normal = np.array([-direction[1], direction[0]]) / max(float(np.hypot(*direction)), 1e-6)
    quad = [start + normal * width0, end + normal * width1, end - normal * width1, start - normal * width0]
    _fill(draw, np.array(quad))
    for centre, radius in ((start, width0), (end, width1)):
        draw.ellipse((*(centre - radius), *(centre + radius)), fill=255)


def blob(rng: np.random.Generator, size: Size) -> Image.Image:
    """Closed curve with a random Fourier radius."""
    turn = np.linspace(0, 2 * np.pi, 160, endpoint=False)
    roughness, radius = rng.uniform(0.1, 0.55), np.ones_like(turn)
    for k in range(2, 9):
        radius += roughness * rng.standard_normal() / k * np.cos(k * turn + rng.uniform(0, 2 * np.pi))
    radius = np.maximum(radius, 0.15)
    image, draw = canvas(size)
    _fill(draw, _into_box(np.stack([radius * np.cos(turn), radius * np.sin(turn)], -1), size))
    return image


def superellipse(rng: np.random.Generator, size: Size) -> Image.Image:
    """From a diamond over an ellipse to a rounded box, tilted."""
    power, turn = rng.choice([1.2, 2.0, 2.0, 3.0, 5.0, 9.0]), np.linspace(0, 2 * np.pi, 120, endpoint=False)
    c, s = np.cos(turn), np.sin(turn)
    points = np.stack([np.sign(c) * np.abs(c) ** (2 / power), np.sign(s) * np.abs(s) ** (2 / power)], -1)
    angle = rng.choice([0.0, rng.uniform(-0.8, 0.8)])
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    turned = points * (1, size[1] / size[0]) @ rotation
    image, draw = canvas(size)
    _fill(draw, _into_box(turned, size))
    return image


def quad(rng: np.random.Generator, size: Size) -> Image.Image:
    """A box face in perspective: book, screen, sign, paper."""
    corners = np.array([(0, 0), (1, 0), (1, 1), (0, 1)]) + rng.uniform(-0.22, 0.22, (4, 2)) * rng.choice([0.1, 1.0])
    image, draw = canvas(size)
    _fill(draw, _into_box(corners, size))
    return image


def polygon(rng: np.random.Generator, size: Size) -> Image.Image:
    """Star-shaped polygon with random corners, sometimes rounded."""
    count = int(rng.integers(5, 14))
    turn = np.sort(rng.uniform(0, 2 * np.pi, count))
    radius = rng.uniform(rng.uniform(0.25, 0.7), 1, count)
    points = np.stack([radius * np.cos(turn), radius * np.sin(turn)], -1)
    image, draw = canvas(size)
    _fill(draw, _into_box(_smooth(points, int(rng.integers(0, 4))), size))
    return image


def cuboid(rng: np.random.Generator, size: Size) -> Image.Image:
    """Outline of a box seen from a corner."""
    dx, dy = rng.uniform(0.15, 0.45), rng.uniform(0.1, 0.35)
    points = np.array([(0, dy), (dx, 0), (1, dy * rng.uniform(0.3, 1)), (1, 1 - dy), (1 - dx, 1), (0, 1 - dy / 2)])
    image, draw = canvas(size)
    _fill(draw, _into_box(points, size))
    return image


def vessel(rng: np.random.Generator, size: Size) -> Image.Image:
    """Symmetric profile: bottle, vase, lamp, cup; sometimes with a handle that leaves a hole."""
    knots = int(rng.integers(4, 9))
    profile = rng.uniform(0.25, 1, knots)
    profile[0] = rng.uniform(0.2, 0.9)
    height = np.linspace(0, 1, 80)
    half = np.interp(height, np.linspace(0, 1, knots), profile)
    half = np.convolve(np.pad(half, 7, mode="edge"), np.ones(15) / 15, "valid")
    image, draw = canvas(size)
    handle = rng.random() < 0.4
    body = size[0] * (0.72 if handle else 1.0)
    left, right = body / 2 * (1 - half / half.max()), body / 2 * (1 + half / half.max())
    if handle:
        thick = max(2, int(size[0] * 0.06))
        top, bottom = size[1] * rng.uniform(0.1, 0.3), size[1] * rng.uniform(0.6, 0.85)
        draw.ellipse((body * 0.65, top, size[0] - 1, bottom), outline=255, width=thick)
    y = height * (size[1] - 1)
    _fill(draw, np.concatenate([np.stack([left, y], -1), np.stack([right, y], -1)[::-1]]))
    return image


def figure(rng: np.random.Generator, size: Size) -> Image.Image:
    """Articulated body: trunk, head, two to four two-part limbs. Upright or on all fours."""
    image, draw = canvas(size)
    width, height = size
    upright = height >= width
    unit = min(width, height) * (0.5 if upright else 0.42)
    thick = unit * rng.uniform(0.16, 0.32)
    if upright:
        hip = np.array([width * rng.uniform(0.4, 0.6), height * rng.uniform(0.5, 0.6)])
        neck = np.array([width * rng.uniform(0.4, 0.6), height * 0.2])
        head = neck + (rng.uniform(-0.1, 0.1) * unit, -height * 0.08)
        limbs = [(neck, 0.3, 0.55, rng.uniform(-0.9, 0.9, 2)) for _ in range(2)]
        limbs += [(hip, 0.45, 0.9, rng.uniform(-0.45, 0.45, 2)) for _ in range(2)]
        reach = height * 0.24
    else:
        hip, neck = np.array([width * 0.2, height * 0.4]), np.array([width * 0.75, height * 0.38])
        head = neck + (width * 0.12, -height * rng.uniform(0.1, 0.25))
        limbs = [(point, 0.4, 0.8, rng.uniform(-0.35, 0.35, 2)) for point in (hip, hip, neck, neck)]
        limbs.append((hip, 0.2, 0.3, np.array([-1.9, -1.2])))
        reach = height * 0.3
    _capsule(draw, hip, neck, thick * 1.25, thick * 1.1)
    radius = unit * rng.uniform(0.18, 0.26)
    _capsule(draw, neck, head, thick * 0.6, radius * 0.7)
    draw.ellipse((*(head - radius), *(head + (radius, radius * 1.2))), fill=255)
    for root, width0, taper, angles in limbs:
        knee = root + reach * np.array([np.sin(angles[0]), np.cos(angles[0])])
        foot = knee + reach * np.array([np.sin(angles[0] + angles[1]), np.cos(angles[0] + angles[1])])
        limb = max(1.0, thick * width0 * rng.uniform(1.0, 1.5))
        _capsule(draw, root, knee, limb, limb * taper)
        _capsule(draw, knee, foot, limb * taper, limb * taper * 0.6)
    return image


def furniture(rng: np.random.Generator, size: Size) -> Image.Image:
    """Slab on thin legs, sometimes with a back of bars: table, chair, bench."""
    image, draw = canvas(size)
    width, height = size
    leg = max(2, int(min(size) * rng.uniform(0.02, 0.08)))
    seat = height * (rng.uniform(0.4, 0.6) if rng.random() < 0.6 else 0.02)
    slab = max(leg, int(height * rng.uniform(0.05, 0.2)))
    draw.rectangle((0, seat, width, seat + slab), fill=255)
    skew = width * rng.uniform(0, 0.08)
    for x in (0.02, 0.98 - leg / width, *([0.25, 0.72] if rng.random() < 0.6 else [])):
        foot = height - 1 if x in (0.02, 0.98 - leg / width) else height * 0.92
        x0 = x * width
        x1 = x0 + skew * (x - 0.5)
        _fill(draw, np.array([(x0, seat), (x0 + leg, seat), (x1 + leg, foot), (x1, foot)]))
    if seat > height * 0.1:
        if rng.random() < 0.5:
            draw.rectangle((0, 0, width, seat * rng.uniform(0.3, 1)), fill=255)
        else:
            for x in np.linspace(0, width - leg, int(rng.integers(2, 7))):
                draw.rectangle((x, 0, x + leg, seat), fill=255)
            draw.rectangle((0, 0, width, leg * 2), fill=255)
    return image


def vehicle(rng: np.random.Generator, size: Size) -> Image.Image:
    """Rounded hull with a cabin and wheels."""
    image, draw = canvas(size)
    width, height = size
    wheel = min(height * rng.uniform(0.16, 0.24), width * 0.14)
    floor = height - wheel
    waist = height * rng.uniform(0.35, 0.5)
    a, b = rng.uniform(0.05, 0.35), rng.uniform(0.45, 0.95)
    draw.rounded_rectangle((0, waist, width - 1, floor), radius=height * 0.12, fill=255)
    lean = rng.uniform(0.02, 0.12)
    roof = np.array([(a, waist + 2), (a + lean, 0), (max(b - lean, a + lean), 0), (b, waist + 2)])
    _fill(draw, roof * (width, 1))
    for x in (rng.uniform(0.12, 0.25), rng.uniform(0.72, 0.86)):
        draw.ellipse((x * width - wheel, height - 2 * wheel, x * width + wheel, height - 1), fill=255)
    return image


def plant(rng: np.random.Generator, size: Size) -> Image.Image:
    """Stem, branches and leaf clusters with gaps between them."""
    image, draw = canvas(size)
    width, height = size
    trunk = max(1.5, width * rng.uniform(0.015, 0.06))
    base, top = np.array([width * rng.uniform(0.4, 0.6), height - 1.0]), np.array([width * 0.5, height * 0.35])
    _capsule(draw, base, top, trunk, trunk * 0.6)
    leafy = rng.random() < 0.6
    for _ in range(int(rng.integers(8, 26))):
        angle, reach = rng.uniform(-2.4, 2.4), rng.uniform(0.15, 0.48)
        tip = np.array([width * (0.5 + reach * np.sin(angle)), height * (0.38 - 0.38 * reach / 0.48 * np.cos(angle))])
        start = base + (top - base) * rng.uniform(0.4, 1)
        _capsule(draw, start, tip, max(1.0, trunk * 0.4), max(1.0, trunk * 0.25))
        radius = np.array([width, height]) * rng.uniform(0.05, 0.16)
        if leafy:
            points = tip + _star(rng, 9) * radius
            _fill(draw, points)
        else:
            direction = (tip - start) / max(float(np.hypot(*(tip - start))), 1e-6) * radius.min() * 2
            normal = np.array([-direction[1], direction[0]]) * 0.3
            leaf = np.array([tip, tip + direction * 0.5 + normal, tip + direction, tip + direction * 0.5 - normal])
            _fill(draw, _smooth(leaf, 2))
    return image


def _star(rng: np.random.Generator, count: int) -> np.ndarray:
    turn = np.linspace(0, 2 * np.pi, count, endpoint=False) + rng.uniform(0, 0.4, count)
    radius = rng.uniform(0.5, 1.2, count)
    return np.stack([radius * np.cos(turn), radius * np.sin(turn)], -1)


def shaggy(rng: np.random.Generator, size: Size) -> Image.Image:
    """Blob with a fractal outline: bush, cloth edge, animal, rock."""
    count = 360
    turn = np.linspace(0, 2 * np.pi, count, endpoint=False)
    spectrum = np.zeros(count // 2 + 1, complex)
    k = np.arange(2, 120)
    spectrum[2:120] = (rng.standard_normal(118) + 1j * rng.standard_normal(118)) / k ** rng.uniform(0.9, 1.5)
    wave = np.fft.irfft(spectrum, count)
    radius = np.exp(wave / wave.std() * rng.uniform(0.08, 0.28))
    image, draw = canvas(size)
    _fill(draw, _into_box(np.stack([radius * np.cos(turn), radius * np.sin(turn)], -1), size))
    return image


def pole(rng: np.random.Generator, size: Size) -> Image.Image:
    """A thin upright with cross-arms and a head: lamp post, sign, antenna. 2-6 px wide whatever the box."""
    image, draw = canvas(size)
    width, height = size
    thick = int(rng.integers(2, 7))
    x = width * rng.uniform(0.3, 0.7)
    draw.rectangle((x, 0, x + thick, height), fill=255)
    for _ in range(int(rng.integers(0, 4))):
        y, reach = height * rng.uniform(0, 0.5), width * rng.uniform(0.1, 0.5)
        ends = (x - reach * rng.random(), y, x + reach, y + height * rng.uniform(-0.03, 0.03))
        draw.line(ends, fill=255, width=max(2, thick - 1))
    if rng.random() < 0.6:
        radius = min(width, height) * rng.uniform(0.1, 0.35)
        box = (max(x - radius, 0), 0, min(x + radius, width), min(2 * radius * rng.uniform(0.6, 1.2), height))
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)(box, fill=255)
    return image


def wire(rng: np.random.Generator, size: Size) -> Image.Image:
    """Sagging or winding line of 2-6 px."""
    image, draw = canvas(size)
    width, height = size
    t = np.linspace(0, 1, 60)
    if rng.random() < 0.5:
        y = rng.random() * (1 - t) + rng.random() * t + rng.uniform(0.1, 0.6) * 4 * t * (1 - t)
        x = t
    else:
        x = np.cumsum(np.convolve(rng.standard_normal(80), np.ones(21) / 21, "valid")) + t * rng.uniform(1, 6)
        y = np.cumsum(np.convolve(rng.standard_normal(80), np.ones(21) / 21, "valid"))
    points = _into_box(np.stack([x, y], -1), (max(width - 8, 2), max(height - 8, 2))) + 4
    draw.line([(float(a), float(b)) for a, b in points], fill=255, width=int(rng.integers(2, 7)), joint="curve")
    return image


def fence(rng: np.random.Generator, size: Size) -> Image.Image:
    """Bars with gaps: fence, rack, railing."""
    image, draw = canvas(size)
    width, height = size
    thick, gap = int(rng.integers(2, 7)), rng.uniform(0.04, 0.15)
    for x in np.arange(0, 1, gap):
        draw.rectangle((x * width, height * rng.choice([0.0, 0.05]), x * width + thick, height), fill=255)
    for y in (rng.uniform(0.05, 0.2), rng.uniform(0.7, 0.95)):
        draw.rectangle((0, y * height, width, y * height + thick), fill=255)
    return image


def ring(rng: np.random.Generator, size: Size) -> Image.Image:
    """Ellipse with a hole: plate rim, wheel, frame."""
    image, draw = canvas(size)
    thick = max(2, int(min(size) * rng.uniform(0.06, 0.25)))
    (draw.ellipse if rng.random() < 0.7 else draw.rectangle)((0, 0, size[0] - 1, size[1] - 1), outline=255, width=thick)
    return image


def text(rng: np.random.Generator, size: Size) -> Image.Image:
    """A few letters; one entity in several parts."""
    image, draw = canvas(size)
    letters = "".join(rng.choice(list("ABCDEFGHKLMNOPRSTUVWXYZ23456789")) for _ in range(int(rng.integers(1, 6))))
    font = ImageFont.load_default(max(6, int(min(size[1], 1.7 * size[0] / len(letters)))))
    box = draw.textbbox((0, 0), letters, font=font, stroke_width=int(rng.integers(0, 3)))
    draw.text((-box[0], -box[1]), letters, fill=255, font=font, stroke_width=int(rng.integers(0, 3)))
    return image


def bunch(rng: np.random.Generator, size: Size) -> Image.Image:
    """Several separate pieces that count as one entity: fruit in a bowl, scattered leaves, clouds."""
    image = Image.new("L", size, 0)
    for _ in range(int(rng.integers(2, 7))):
        w, h = (max(3, int(side * rng.uniform(0.2, 0.5))) for side in size)
        piece = (blob if rng.random() < 0.6 else superellipse)(rng, (w, h))
        image.paste(255, (int(rng.integers(0, size[0] - w + 1)), int(rng.integers(0, size[1] - h + 1))), piece)
    return image


# (function, relative frequency, range of width / height)
SOLID = (
    (blob, 3, (0.5, 2.0)),
    (superellipse, 3, (0.4, 2.5)),
    (quad, 3, (0.4, 3.0)),
    (polygon, 2, (0.5, 2.0)),
    (cuboid, 2, (0.5, 2.0)),
    (vessel, 3, (0.3, 1.1)),
    (figure, 4.5, (0.35, 1.9)),
    (furniture, 2, (0.5, 1.8)),
    (vehicle, 2.5, (1.4, 2.6)),
    (plant, 1.5, (0.5, 1.3)),
    (shaggy, 3, (0.5, 2.2)),
    (ring, 0.7, (0.6, 1.6)),
    (text, 0.4, (1.0, 4.0)),
    (bunch, 0.8, (0.7, 2.0)),
)
# Prints on a surface: nothing that would itself be an entity elsewhere.
MARKS = ((polygon, 2, None), (quad, 2, None), (blob, 2, None), (superellipse, 1, None), (text, 1, None))
SIMPLE = tuple(row for row in SOLID if row[0] in (blob, superellipse, quad, polygon, cuboid, vessel))
THIN = ((pole, 3, (0.1, 0.5)), (wire, 3, (0.8, 6.0)), (fence, 0.6, (1.0, 4.0)))


def choose(rng: np.random.Generator, table):
    """A row of `SOLID` or `THIN`, by its frequency."""
    weights = np.array([row[1] for row in table], float)
    return table[int(rng.choice(len(table), p=weights / weights.sum()))]
