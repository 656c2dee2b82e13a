"""What things look like: materials, relief, shadows, light and the camera, on 8-bit images with PIL's C loops."""

import dataclasses
import functools

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from scipy import ndimage

from data.scenes import shapes, textures
from data.scenes.layout import Item, Layout

BILINEAR = Image.Resampling.BILINEAR


@dataclasses.dataclass(frozen=True)
class Light:
    """direction: unit vector (x, y) that the light comes from; shadow: opacity of cast shadows; soft: their blur."""

    direction: np.ndarray
    shadow: float
    soft: float
    relief: float


@dataclasses.dataclass(frozen=True)
class Haze:
    """Colour that far things fade into, and how much of it the farthest show."""

    colour: tuple[int, int, int]
    amount: float

    def over(self, surface: Image.Image, depth: float) -> Image.Image:
        if not self.amount:
            return surface
        return Image.blend(surface, Image.new("RGB", surface.size, self.colour), self.amount * depth)


@dataclasses.dataclass(frozen=True)
class Material:
    """A texture with its colouring; `paint` gives windows of it.

    texture: gray (h, w) pattern, coloured through `palette` (256, 3), or an RGB photograph, recoloured by `matrix`.
    zoom: output pixels per texture pixel.
    """

    texture: np.ndarray
    palette: np.ndarray
    matrix: tuple[float, ...]
    zoom: float
    turn: int

    def paint(self, rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
        width, height = (max(2, int(np.ceil(side / self.zoom))) for side in size)
        if self.turn:
            width, height = height, width
        pixels = textures.window(self.texture, height, width, rng)
        if pixels.ndim == 2:
            image = Image.fromarray(self.palette[pixels])
        else:
            image = Image.fromarray(pixels).convert("RGB", self.matrix)
        if self.turn:
            image = image.transpose(Image.Transpose.ROTATE_90)
        return image.resize(size, Image.Resampling.BICUBIC if self.zoom > 2.5 else BILINEAR)


def random_colour(rng: np.random.Generator) -> np.ndarray:
    """RGB 0..255: a pixel of a photograph, or a colour of natural, sometimes of painted saturation."""
    if rng.random() < 0.5:
        pixels = textures.photo(str(rng.choice(["astronaut", "coffee", "cat", "rocket", "tissue"])))
        return pixels[int(rng.integers(pixels.shape[0])), int(rng.integers(pixels.shape[1]))].astype(np.float32)
    hue, saturation, value = rng.random(), rng.beta(1.2, 4.0), rng.uniform(0.1, 0.95)
    if rng.random() < 0.15:
        saturation = rng.uniform(0.5, 1.0)
    k = (np.array([5, 3, 1]) + 6 * hue) % 6
    return (255 * value * (1 - saturation * np.clip(np.minimum(k, 4 - k), 0, 1))).astype(np.float32)


def _scene_colour(rng: np.random.Generator, colours: list[np.ndarray]) -> np.ndarray:
    """Mostly one of the few colours of the scene, a little lighter or darker: pictures repeat their colours."""
    if rng.random() < 0.2:
        return random_colour(rng)
    return np.clip(colours[int(rng.integers(len(colours)))] * np.exp(0.25 * rng.standard_normal()), 0, 255)


def random_material(rng: np.random.Generator, middle: np.ndarray, second: np.ndarray, scenic: float = 0.12) -> Material:
    """A material whose patterns run from dark over `middle` to a lighter tone of `second` (RGB 0..255).

    `scenic` is the share of printed photographs: things whose inside shows other things.
    """
    draw = rng.random()
    if draw < scenic:
        texture = textures.photo(str(rng.choice(textures.SCENIC_PHOTOS)))
    elif draw < scenic + 0.25:
        texture = textures.photo(str(rng.choice(textures.MATERIAL_PHOTOS)))
        if rng.random() < 0.6:
            texture = texture[..., 1]
    else:
        kind = str(rng.choice(list(textures.PATTERNS)))
        texture = textures.pattern(kind, int(rng.integers(textures.VARIANTS)))
    contrast = np.exp(rng.uniform(np.log(0.4), np.log(0.95)))
    dark, light = middle * (1 - contrast), second + (255 - second) * contrast * rng.uniform(0.3, 1)
    ramp = np.linspace(0, 1, 256)[:, None]
    palette = np.where(ramp < 0.5, dark + (middle - dark) * 2 * ramp, middle + (light - middle) * (2 * ramp - 1))
    return Material(
        texture,
        np.clip(palette, 0, 255).astype(np.uint8),
        _colour_matrix(rng),
        zoom=float(np.exp(rng.uniform(np.log(0.5), np.log(6)))),
        turn=int(rng.integers(2)),
    )


def _colour_matrix(rng: np.random.Generator) -> tuple[float, ...]:
    """Random mixture of the channels: hue turned, saturation and brightness changed."""
    gray = np.full((3, 3), 1 / 3)
    mix = np.eye(3)[rng.permutation(3)] if rng.random() < 0.4 else np.eye(3)
    saturation = rng.uniform(0.2, 1.3)
    matrix = (gray + (mix - gray) * saturation) * rng.uniform(0.6, 1.25)
    matrix = matrix * rng.uniform(0.8, 1.2, (3, 1))
    return tuple(np.concatenate([matrix, rng.uniform(-20, 20, (3, 1))], axis=1).ravel().tolist())


def render(rng: np.random.Generator, layout: Layout) -> np.ndarray:
    """RGB uint8 (height, width, 3) picture of a layout."""
    angle = rng.uniform(-np.pi, 0)
    light = Light(
        np.array([np.cos(angle), np.sin(angle)]), rng.uniform(0.0, 0.65), rng.uniform(0.02, 0.2), rng.uniform(0.3, 1.0)
    )
    colours = [random_colour(rng) for _ in range(int(rng.integers(2, 6)))]
    haze = Haze(_rgb(random_colour(rng)), 0.0)
    if layout.style == "outdoor" and rng.random() < 0.5:
        haze = dataclasses.replace(haze, amount=rng.uniform(0, 0.5))
    picture = _background(rng, layout, colours, haze)
    if rng.random() < 0.15:
        picture = picture.filter(ImageFilter.BoxBlur(rng.uniform(1, 6)))  # out of focus
    shared: dict[int, Material] = {}
    previous = None
    for item in layout.items:
        if item.mask is None:
            continue
        material = shared.get(item.group)
        # Sometimes the material of the thing before: only the outline tells the two apart.
        if material is None and previous is not None and rng.random() < 0.4:
            material = previous
        elif material is None:
            middle = _behind(picture, item) if rng.random() < 0.6 else _scene_colour(rng, colours)
            second = _scene_colour(rng, colours) if rng.random() < 0.3 else middle
            material = random_material(rng, middle, second)
        previous = material
        if item.group >= 0:
            shared[item.group] = material
        _draw(rng, picture, item, material, colours, light, haze)
    return _camera(rng, picture)


def _behind(picture: Image.Image, item: Item) -> np.ndarray:
    """Colour of the picture where the item will be: things often resemble what is behind them."""
    assert item.mask is not None
    x = min(max(item.corner[0] + item.mask.width // 2, 0), picture.width - 1)
    y = min(max(item.corner[1] + item.mask.height // 2, 0), picture.height - 1)
    return np.array(picture.getpixel((x, y)), np.float32)


def _background(rng, layout: Layout, colours, haze: Haze) -> Image.Image:
    height, width = layout.labels.shape
    picture = Image.new("RGB", (width, height))
    covered = layout.labels > sum(item.mask is None for item in layout.items)
    for number, item in enumerate(layout.items, start=1):
        if item.mask is not None:
            continue
        own = layout.labels == number
        rows, columns = (np.flatnonzero(own.any(axis)) for axis in (1, 0))
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        size = (box[2] - box[0], box[3] - box[1])
        sky = layout.style == "outdoor" and number == 1
        if sky:
            surface = _sky(rng, size)
        else:
            material = random_material(rng, _scene_colour(rng, colours), _scene_colour(rng, colours), scenic=0.02)
            receding = layout.style in ("outdoor", "room") and box[3] >= height and rng.random() < 0.7
            surface = _receding(rng, material, size) if receding else material.paint(rng, size)
            if rng.random() < 0.5:
                _decorate(rng, surface, colours)
            surface = _worn(rng, surface)
        surface = ImageChops.hard_light(surface, _slope(rng, size, rough=not sky))
        if not sky:
            surface = haze.over(surface, item.depth)
        # Silhouettes come on top, so what they cover may be filled as well.
        mask = (own | covered)[box[1] : box[3], box[0] : box[2]]
        picture.paste(surface, box[:2], Image.fromarray(mask.view(np.uint8) * np.uint8(255)))
    return picture


def _rgb(colour: np.ndarray) -> tuple[int, int, int]:
    return tuple(int(value) for value in np.clip(colour, 0, 255))  # type: ignore[return-value]


def _sky(rng, size) -> Image.Image:
    top, bottom = random_colour(rng), random_colour(rng)
    if rng.random() < 0.7:
        top = np.array([60, 120, 200.0]) * rng.uniform(0.6, 1.2)
        bottom = np.array([190, 210, 230.0]) * rng.uniform(0.8, 1.1)
    ramp = np.linspace(0, 1, 64)[:, None, None]
    sky = Image.fromarray(np.clip(top + (bottom - top) * ramp, 0, 255).astype(np.uint8)).resize(size, BILINEAR)
    clouds = Image.fromarray(textures.window(textures.pattern("cloud", int(rng.integers(3))), 200, 300, rng))
    level, amount = rng.uniform(90, 200), rng.uniform(0.2, 1.0)
    table = [int(np.clip((v - level) * 4, 0, 255) * amount) for v in range(256)]
    white = Image.new("RGB", size, _rgb(np.array([235, 235, 240]) * rng.uniform(0.5, 1.05)))
    sky.paste(white, (0, 0), clouds.point(table).resize(size, Image.Resampling.BICUBIC))
    return sky


def _receding(rng, material: Material, size) -> Image.Image:
    """A plane seen at an angle: the texture shrinks towards the top."""
    width, height = size
    source = material.paint(rng, (min(width, 1400), min(height, 1000)))
    squeeze = rng.uniform(0.1, 0.6)
    sw, sh = source.size
    # Projective map that takes the output rectangle to a source trapezoid, wider at the far side.
    far = np.array([(0, 0), (width, 0), (width, height), (0, height)], float)
    margin = sw * (1 - squeeze) / 2
    near = np.array([(0, 0), (sw, 0), (sw - margin, sh), (margin, sh)], float)
    return source.transform(size, Image.Transform.PERSPECTIVE, _projective(far, near), BILINEAR)


def _projective(target: np.ndarray, source: np.ndarray) -> list[float]:
    rows, values = [], []
    for (x, y), (u, v) in zip(target, source, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return np.linalg.solve(np.array(rows), np.array(values)).tolist()


def _slope(rng, size, rough: bool = True) -> Image.Image:
    """Light falling unevenly: a smooth gray field around 128; `rough` surfaces may have folds and faces."""
    field = rng.standard_normal((4, 4)) * rng.uniform(2, 25)
    field += np.linspace(-1, 1, 4)[:, None] * rng.normal(0, 24) + np.linspace(-1, 1, 4)[None] * rng.normal(0, 16)
    small = Image.fromarray(np.clip(128 + field, 0, 255).astype(np.uint8)).resize((96, 96), Image.Resampling.BICUBIC)
    shade = np.asarray(small, np.float32)
    if rough:
        shade = shade + _folds(rng, (96, 96)) + _facets(rng, (96, 96), smooth=rng.uniform(0.5, 4))
    return _gray(shade).resize(size, BILINEAR).convert("RGB")


def _gray(shade: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(shade, 0, 255).astype(np.uint8))


def _folds(rng, shape: tuple[int, int]) -> np.ndarray | float:
    """Creases of cloth, waves of ground, around 0; often none."""
    if rng.random() < 0.5:
        return 0.0
    tile = textures.pattern(str(rng.choice(["cloud", "rough", "ridges"])), int(rng.integers(textures.VARIANTS)))
    scale = int(rng.integers(1, 6))
    piece = textures.window(tile, shape[0] * scale, shape[1] * scale, rng)[::scale, ::scale].astype(np.float32)
    return (piece - piece.mean()) * rng.uniform(0.1, 0.4)


def _facets(rng, shape: tuple[int, int], smooth: float) -> np.ndarray | float:
    """Faces turned to or away from the light, around 0; often none."""
    if rng.random() < 0.3:
        return 0.0
    y, x = np.mgrid[-1 : 1 : shape[0] * 1j, -1 : 1 : shape[1] * 1j]
    shade = np.zeros(shape, np.float32)
    for _ in range(int(rng.integers(1, 4))):
        angle = rng.choice([0.0, np.pi / 2, rng.uniform(0, np.pi)]) + 0.15 * rng.standard_normal()
        shade += rng.normal(0, 40) * (np.cos(angle) * x + np.sin(angle) * y > rng.uniform(-0.7, 0.7))
    return ndimage.gaussian_filter(shade - shade.mean(), smooth)


def _draw(rng, picture: Image.Image, item: Item, material: Material, colours, light: Light, haze: Haze) -> None:
    mask = item.mask
    assert mask is not None
    if light.shadow and item.solid:
        _cast_shadow(rng, picture, item, light)
    surface = material.paint(rng, mask.size)
    if item.solid:
        if rng.random() < 0.95:
            _colour_parts(rng, surface, item.kind, colours)
        if rng.random() < 0.6:
            _decorate(rng, surface, colours)
        surface = _worn(rng, surface)
        surface = ImageChops.hard_light(surface, _relief(rng, mask, light))
    picture.paste(haze.over(surface, item.depth), item.corner, mask)


def _cast_shadow(rng, picture: Image.Image, item: Item, light: Light) -> None:
    assert item.mask is not None
    width, height = item.mask.size
    reach = min(width, height)
    pad = int(0.4 * reach) + 4
    scale = max(1.0, max(width, height) / 96)
    small = item.mask.resize((max(1, int(width / scale)), max(1, int(height / scale))), BILINEAR)
    border = int(pad / scale)
    shadow = Image.new("L", (small.width + 2 * border, small.height + 2 * border), 0)
    distance = reach * rng.uniform(0.03, 0.18) / scale
    offset = (int(border - light.direction[0] * distance), int(border - light.direction[1] * distance))
    shadow.paste(small, offset)
    shadow = shadow.filter(ImageFilter.GaussianBlur(0.5 + reach * light.soft / scale))
    box = (item.corner[0] - pad, item.corner[1] - pad, item.corner[0] + width + pad, item.corner[1] + height + pad)
    box = (max(box[0], 0), max(box[1], 0), min(box[2], picture.width), min(box[3], picture.height))
    if box[2] <= box[0] or box[3] <= box[1]:
        return
    full = shadow.resize((width + 2 * pad, height + 2 * pad), BILINEAR)
    x, y = item.corner[0] - pad, item.corner[1] - pad
    full = full.crop((box[0] - x, box[1] - y, box[2] - x, box[3] - y))
    strength = light.shadow
    ground = picture.crop(box)
    picture.paste(ground.point([int(v * (1 - strength)) for v in range(256)] * 3), box[:2], full)


# Bands of the height, top to bottom, that tend to differ in colour: head, clothes; roof, hull, wheels; cap, label.
_PARTS = {
    "figure": ((0.0, 0.19), (0.19, 0.54), (0.54, 0.93), (0.93, 1.0)),
    "vehicle": ((0.06, 0.4), (0.74, 1.0)),
    "vessel": ((0.0, 0.12), (0.35, 0.7)),
    "plant": ((0.62, 1.0),),
    "furniture": ((0.0, 0.38), (0.42, 0.6)),
    "cuboid": ((0.0, 0.3),),
    "quad": ((0.0, 0.22), (0.8, 1.0)),
}


def _colour_parts(rng, surface: Image.Image, kind: str, colours) -> None:
    """Gives the parts of a thing their own colours: different colours do not make different entities."""
    width, height = surface.size
    cuts = np.sort(rng.random(2 * int(rng.integers(1, 4))))
    for top, bottom in _PARTS.get(kind, tuple(zip(cuts[::2], cuts[1::2], strict=True))):
        if rng.random() < 0.25:
            continue
        y0, y1 = (int((y + rng.normal(0, 0.02)) * height) for y in (top, bottom))
        y0, y1 = max(y0, 0), min(y1, height)
        if y1 - y0 < 2:
            continue
        material = random_material(rng, _scene_colour(rng, colours), _scene_colour(rng, colours), scenic=0.03)
        surface.paste(material.paint(rng, (width, y1 - y0)), (0, y0))


def _decorate(rng, surface: Image.Image, colours) -> None:
    """Marks of another material inside one entity: bands, patches, spots, prints."""
    width, height = surface.size
    for _ in range(int(rng.integers(1, 6))):
        choice = rng.random()
        mark = Image.new("L", surface.size, 0)
        draw = ImageDraw.Draw(mark)
        if choice < 0.35:  # band across, e.g. trousers under a shirt, a label
            a, b = np.sort(rng.uniform(-0.2, 1.2, 2))
            tilt = rng.normal(0, 0.12)
            ends = [(0, a - tilt), (1, a + tilt), (1, b + tilt), (0, b - tilt)]
            if rng.random() < 0.35:
                ends = [(y, x) for x, y in ends]
            draw.polygon([(x * width, y * height) for x, y in ends], fill=255)
        elif choice < 0.88:
            function = shapes.choose(rng, shapes.MARKS)[0]
            w, h = (max(8, int(side * rng.uniform(0.15, 0.6))) for side in surface.size)
            corner = (int(rng.uniform(-0.2, 0.9) * width), int(rng.uniform(-0.2, 0.9) * height))
            mark.paste(function(rng, (w, h)), corner)
        else:
            for _ in range(int(rng.integers(3, 25))):
                x, y, r = rng.random() * width, rng.random() * height, min(width, height) * rng.uniform(0.02, 0.08)
                draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
        if width * height < 400_000 and rng.random() < 0.6:
            other = random_material(rng, _scene_colour(rng, colours), _scene_colour(rng, colours))
            surface.paste(other.paint(rng, surface.size), (0, 0), mark)
        else:
            surface.paste(_rgb(_scene_colour(rng, colours)), (0, 0, width, height), mark)


def _worn(rng, surface: Image.Image) -> Image.Image:
    """Stains, dapples and highlights larger than the material's own pattern, and fine grain over everything."""
    width, height = surface.size
    if width * height > 2000 and rng.random() < 0.6:
        zoom = max(width, height) / rng.uniform(60, 400)
        surface = _overlay(rng, surface, ("rough", "marble", "cells", "leaves", "ridges"), zoom, rng.uniform(0.15, 0.5))
    if rng.random() < 0.85:
        zoom = float(np.exp(rng.uniform(np.log(1.5), np.log(5))))
        kinds = ("grain", "speckle", "strokes", "leaves", "weave", "brushed", "cells", "rough")
        surface = _overlay(rng, surface, kinds, zoom, rng.uniform(0.1, 0.9))
    return surface


def _overlay(rng, surface: Image.Image, kinds: tuple[str, ...], zoom: float, strength: float) -> Image.Image:
    """Lightens and darkens by a pattern at `zoom` output pixels per pattern pixel."""
    size = (int(np.ceil(surface.height / zoom)), int(np.ceil(surface.width / zoom)))
    pattern = textures.pattern(str(rng.choice(kinds)), int(rng.integers(textures.VARIANTS)))
    # The table centres the pattern at the neutral 128.
    table = np.clip(128 + (np.arange(256) - float(pattern.mean())) * strength, 0, 255).astype(np.uint8)
    shade = Image.fromarray(table[textures.window(pattern, *size, rng)])
    return ImageChops.hard_light(surface, shade.resize(surface.size, BILINEAR).convert("RGB"))


def _relief(rng, mask: Image.Image, light: Light) -> Image.Image:
    """Shading of the silhouette blown up like a cushion, gray 128 where the surface faces the viewer."""
    scale = max(1.0, max(mask.size) / 80)
    small = mask.resize((max(2, int(mask.width / scale)), max(2, int(mask.height / scale))), BILINEAR)
    inside = np.pad(np.asarray(small) > 127, 1)
    distance = ndimage.distance_transform_edt(inside)
    top = max(float(distance.max()), 1.0)
    radius = top * rng.uniform(0.25, 1.0)
    height = np.sqrt(np.maximum(1 - (1 - np.minimum(distance / radius, 1)) ** 2, 0)) * radius
    height = ndimage.gaussian_filter(height, 1.0)
    dy, dx = np.gradient(height)
    lit = -(dx * light.direction[0] + dy * light.direction[1]) / np.sqrt(1 + dx**2 + dy**2)
    ramp = np.linspace(-1, 1, lit.shape[0])[:, None] * rng.normal(0, 0.25)
    shade = 128 + 110 * light.relief * rng.uniform(0.3, 1.0) * (lit + ramp)
    shade = (shade + _folds(rng, lit.shape) + _facets(rng, lit.shape, smooth=rng.uniform(0.3, 1.5)))[1:-1, 1:-1]
    return _gray(shade).resize(mask.size, Image.Resampling.BICUBIC).convert("RGB")


def _camera(rng, picture: Image.Image) -> np.ndarray:
    """Uneven light, tone curve, lens blur and sensor noise."""
    picture = ImageChops.hard_light(picture, _slope(rng, picture.size, rough=False))
    # Exposed so that the mean comes out like that of a photograph.
    mean = np.asarray(picture.resize((32, 32), BILINEAR)).mean() / 255
    gamma = np.clip(np.log(rng.uniform(0.28, 0.6)) / np.log(np.clip(mean, 0.02, 0.98)), 0.4, 1.6)
    gain = rng.uniform(0.9, 1.1, 3)
    curve = np.linspace(0, 1, 256) ** gamma
    table = np.clip(curve[None] * gain[:, None] * 255 + rng.uniform(-8, 12), 0, 255).astype(int)
    picture = picture.point(table.ravel().tolist())
    picture = picture.filter(ImageFilter.BoxBlur(float(np.exp(rng.uniform(np.log(0.35), np.log(1.3))))))
    noise = 128 + _noise_tile() * rng.uniform(0, 0.06)
    noise = np.clip(np.round(noise), 0, 255).astype(np.uint8)
    noise = Image.fromarray(textures.window(noise, picture.height, picture.width, rng))
    return np.asarray(ImageChops.add(picture, noise, offset=-128))


@functools.lru_cache(maxsize=1)
def _noise_tile() -> np.ndarray:
    """Colour noise of standard deviation about 64, float32 (512, 512, 3)."""
    rng = np.random.default_rng(0)
    return (40 * rng.standard_normal((512, 512, 3)) + 50 * rng.standard_normal((512, 512, 1))).astype(np.float32)
