"""Copy-paste collages: entities cut out of annotated photographs, pasted on photographs and rendered scenes.

    python -m data.collage --out datasets/collages --count 4000 --source train.json,IMAGES --source more.json,IMAGES,cut

A source is a COCO-format JSON (RLE or polygons) and the folder of its images; `,cut` says that its images have
unlabelled entities and serve for cutting out only. Photographs become a background if at most --max-unlabelled of
them is unlabelled; their own labels stay, less what gets covered. The output is an ordinary COCO data set with masks
that never overlap. Collage i depends on the sources, the seed and i alone; a second call makes only what is missing.
"""

import argparse
import dataclasses
import functools
import hashlib
import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int, UInt8
from PIL import Image
from scipy import ndimage

from data.coco_writer import Picture, write_pictures
from data.scenes import SceneConfig, render_scene
from data.scenes.layout import MIN_VISIBLE
from esg_jax.input import augment, transforms
from esg_jax.input.image_io import ImageError
from esg_jax.input.readers import CocoInstances, SourceConfig, read_json

# Part of what a finished folder is recognised by; raise it when equal seeds give other pixels.
VERSION = 1
BILINEAR = Image.Resampling.BILINEAR
# Cut-outs have at least this many pixels across, fill this share of their box and lie to this share in one piece.
MIN_SIDE, MIN_FILL, MIN_WHOLE = 20, 0.12, 0.8
# Blur of the pasted edge in pixels (standard deviation): a feather of about one pixel on either side.
FEATHER = 0.6


@dataclasses.dataclass(frozen=True)
class CollageSource:
    """annotations: COCO-format JSON. images: folder of its images. background: its images may be one."""

    annotations: str
    images: str
    background: bool = True


@dataclasses.dataclass(frozen=True)
class CollageConfig:
    """What collages are like.

    long_side: pixels, uniform in the range.
    aspects: long over short side, one is drawn.
    portrait: share of upright pictures.
    entities: pasted ones, about log-uniform in the range, before those too hidden are dropped.
    areas: fraction of the picture that a pasted entity has before occlusion, log-uniform in the range.
    scales: pasted over original pixels; limits what `areas` asks for.
    min_area: fraction of the picture that an entity must show.
    textured: share of rendered backgrounds.
    mosaic: share of the other backgrounds that show several photographs, always where one would have to grow by more
        than the largest of `scales`.
    max_unlabelled: fraction of a background that may be unlabelled.
    """

    long_side: tuple[int, int] = (512, 640)
    aspects: tuple[float, ...] = SceneConfig.aspects
    portrait: float = 0.3
    entities: tuple[int, int] = (3, 24)
    areas: tuple[float, float] = (0.002, 0.2)
    scales: tuple[float, float] = (0.12, 1.6)
    min_area: float = 0.0005
    textured: float = 0.3
    mosaic: float = 0.25
    max_unlabelled: float = 0.05

    def __post_init__(self):
        for name in ("long_side", "entities", "areas", "scales"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} is {low} {high}; it must be a range MIN MAX with 0 < MIN <= MAX")
        if self.long_side[0] < 64:
            raise ValueError(f"long_side starts at {self.long_side[0]}; collages have at least 64 pixels")
        for name in ("portrait", "min_area", "textured", "mosaic", "max_unlabelled"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a fraction, from 0 to 1")


@dataclasses.dataclass(frozen=True)
class CutOut:
    """An entity apart from its picture.

    image: RGB, outside of the entity filled with the nearest of its colours, so that resizing mixes nothing in.
    mask: where it is. cut: which sides (left, top, right, bottom) the border of its photograph cut off.
    """

    image: UInt8[np.ndarray, "h w 3"]
    mask: Bool[np.ndarray, "h w"]
    cut: tuple[bool, bool, bool, bool]
    file_name: str


@dataclasses.dataclass(frozen=True)
class Patch:
    """A transformed cut-out in its place: corner (x, y) of its box, which may lie outside of the picture."""

    image: UInt8[np.ndarray, "h w 3"]
    alpha: Float32[np.ndarray, "h w"]
    corner: tuple[int, int]
    file_name: str

    @property
    def inside(self) -> Bool[np.ndarray, "h w"]:
        """The pixels that are the entity's: those it makes up at least half of."""
        return self.alpha >= 0.5


@dataclasses.dataclass(frozen=True)
class Background:
    """labels: 0 unlabelled, 1.. entities in any order."""

    image: UInt8[np.ndarray, "height width 3"]
    labels: Int[np.ndarray, "height width"]
    kind: str
    file_names: tuple[str, ...]


class Photographs:
    """The images of a source, and what can be cut out of them."""

    def __init__(self, source: CollageSource):
        content = read_json(source.annotations)
        config = SourceConfig(annotations=source.annotations, images=source.images)
        self.background = source.background
        self.records = CocoInstances(config, content)
        # Stuff (sky, road) is seldom a whole; where a file marks things, only they are cut out.
        things = {entry.get("id") for entry in content["annotations"] if entry.get("isthing")}
        self.things = things or None
        self._load = functools.lru_cache(maxsize=24)(self._load)

    def __len__(self) -> int:
        return len(self.records)

    def load(self, row: int) -> tuple[str, np.ndarray, Any]:
        """File name, pixels and entities of an image; the last few are remembered."""
        return self._load(row)

    def _load(self, row):
        record = self.records[row]
        return record.name, record.load_image(), record.load_entities()

    def cut_out(self, rng: np.random.Generator, row: int) -> CutOut | None:
        """A random entity of an image, None if it has none worth pasting."""
        name, image, entities = self.load(row)
        whole = [
            k
            for k, annotation in enumerate(entities.ids)
            if not entities.crowd[k] and (self.things is None or annotation in self.things)
        ]
        for k in rng.permutation(whole)[:6]:
            if (found := _cut_out(image, entities.mask(int(k)), name)) is not None:
                return found
        return None

    def labels(self, row: int) -> tuple[str, np.ndarray, np.ndarray]:
        """File name, pixels and label map of an image: smaller layers lie on top, crowds are unlabelled."""
        name, image, entities = self.load(row)
        labels = np.zeros(image.shape[:2], np.int32)
        for layer in entities.layers:
            np.copyto(labels, layer, where=layer > 0, casting="unsafe")
        crowd = 1 + np.flatnonzero(entities.crowd)
        labels[np.isin(labels, crowd)] = 0
        return name, image, labels


def _cut_out(image: np.ndarray, mask: np.ndarray, name: str) -> CutOut | None:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    y0, y1, x0, x1 = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    height, width = mask.shape
    cut = (x0 == 0, y0 == 0, x1 == width, y1 == height)
    box = mask[y0:y1, x0:x1]
    # What reaches from border to border is no silhouette, what is small no picture of anything.
    if (cut[0] and cut[2]) or (cut[1] and cut[3]) or min(box.shape) < MIN_SIDE or box.mean() < MIN_FILL:
        return None
    pieces, _ = ndimage.label(box)
    sizes = np.bincount(pieces.ravel())[1:]
    if sizes.max() < MIN_WHOLE * sizes.sum():
        return None
    box = np.pad(pieces == 1 + int(np.argmax(sizes)), 2)
    # Annotated outlines run a little outside, but what is thin must not be lost.
    inner = ndimage.binary_erosion(box)
    box = inner if inner.sum() > 0.8 * box.sum() else box
    pixels = np.pad(image[y0:y1, x0:x1], ((2, 2), (2, 2), (0, 0)))
    nearest = ndimage.distance_transform_edt(~box, return_distances=False, return_indices=True)
    return CutOut(pixels[tuple(nearest)], box, tuple(bool(side) for side in cut), name)  # type: ignore[arg-type]


def make_collage(
    seed: int | tuple[int, ...], sources: Sequence[CollageSource], config: CollageConfig | None = None
) -> Picture:
    """The collage of a seed.

    Raises:
        ValueError, FileNotFoundError, ImageError: a source is malformed (the file is named), no image of any offers
            an entity, or none is densely enough labelled to be a background while not all are `textured`.
    """
    config, photographs = config or CollageConfig(), open_photographs(tuple(sources))
    rng = np.random.default_rng(seed)
    long_side = int(rng.integers(config.long_side[0], config.long_side[1] + 1))
    aspect, upright = float(rng.choice(config.aspects)), bool(rng.random() < config.portrait)
    if rng.random() < config.textured:
        background = _rendered(rng, long_side, aspect, upright, config)
    else:
        size = (long_side, int(long_side / aspect))
        background = _photographed(rng, size if upright else size[::-1], photographs, config)
    low, high = config.entities
    count = int(np.exp(rng.uniform(np.log(low), np.log(high + 1))))
    patches = _visible_patches(_patches(rng, count, background.labels.shape, photographs, config), background, config)
    image, labels = background.image.copy(), background.labels.copy()
    first = int(labels.max()) + 1
    for number, patch in enumerate(patches, start=first):
        own, theirs = _overlap(patch, labels.shape)
        alpha = patch.alpha[own][..., None]
        image[theirs] = np.round(image[theirs] * (1 - alpha) + patch.image[own] * alpha).astype(np.uint8)
        labels[theirs][patch.inside[own]] = number
    names = dict.fromkeys((*background.file_names, *(patch.file_name for patch in patches)))
    fields = {"background": background.kind, "sources": list(names)}
    return Picture(image, *_compact(labels, config.min_area), quality=92, fields=fields)


@functools.lru_cache(maxsize=2)
def open_photographs(sources: tuple[CollageSource, ...]) -> tuple[Photographs, ...]:
    """Raises ValueError, FileNotFoundError as `CocoInstances`, or when there is nothing to cut out."""
    photographs = tuple(Photographs(source) for source in sources)
    if not sum(int(source.records.num_entities.sum()) for source in photographs):
        raise ValueError(
            f"no entity to cut out in {', '.join(source.annotations for source in sources) or 'no source'}"
        )
    return photographs


def _choose(rng, photographs: Sequence[Photographs]) -> tuple[Photographs, int]:
    """An image, each as likely as the other."""
    ends = np.cumsum([len(source) for source in photographs])
    index = int(rng.integers(ends[-1]))
    number = int(np.searchsorted(ends, index, side="right"))
    return photographs[number], index - int(ends[number]) + len(photographs[number])


def _rendered(rng, long_side: int, aspect: float, upright: bool, config: CollageConfig) -> Background:
    """A scene of few entities; painting it is the only use of textures."""
    scene_config = SceneConfig(
        long_side=(long_side, long_side),
        aspects=(aspect,),
        entities=(2, 8),
        min_area=config.min_area,
        portrait=float(upright),
    )
    scene = render_scene(tuple(int(word) for word in rng.integers(2**31, size=2)), scene_config)
    return Background(scene.image, scene.labels.astype(np.int32), "scene", ())


def _photographed(rng, size: tuple[int, int], photographs, config: CollageConfig) -> Background:
    """One photograph, or a grid of them with uneven seams, each a random window of the aspect needed."""
    usable = [source for source in photographs if source.background]
    if not usable:
        raise ValueError("no source may be a background; give one without ',cut', or set textured to 1")
    grid = [1, 1]
    if rng.random() < config.mosaic:
        grid = [int(value) for value in rng.choice([(1, 2), (2, 1), (2, 2)])]
    image, labels, names = np.zeros((*size, 3), np.uint8), np.zeros(size, np.int32), []
    for _ in range(60):
        filled, names = 0, []
        cuts = [_cuts(rng, side, count) for side, count in zip(size, grid, strict=True)]
        for y0, y1 in itertools.pairwise(cuts[0]):
            for x0, x1 in itertools.pairwise(cuts[1]):
                found = _window(rng, (y1 - y0, x1 - x0), usable, config, config.min_area * size[0] * size[1])
                if found is None:
                    continue
                name, pixels, own = found
                image[y0:y1, x0:x1] = pixels
                labels[y0:y1, x0:x1] = np.where(own > 0, own + labels.max(), 0)
                names.append(name)
                filled += 1
        if filled == grid[0] * grid[1]:
            return Background(image, labels, "photograph" if filled == 1 else "mosaic", tuple(names))
        # Where single photographs are too small for so large a picture, take more of them.
        labels[:] = 0
        grid[int(rng.integers(2))] += 1
        if max(grid) > 8:
            break
    raise ValueError(
        f"found no window of a photograph with at most {config.max_unlabelled:.0%} unlabelled; give a densely labelled "
        "source, raise --max-unlabelled, or set --textured to 1"
    )


def _cuts(rng, side: int, count: int) -> list[int]:
    inner = (np.arange(1, count) + rng.uniform(-0.2, 0.2, count - 1)) / count
    return [0, *(int(value) for value in np.round(inner * side)), side]


def _window(
    rng, size: tuple[int, int], photographs, config: CollageConfig, least: float
) -> tuple[str, np.ndarray, np.ndarray] | None:
    """A part of a dense photograph at this size; None if a few tries find none that is large and dense enough.

    Entities of fewer than `least` pixels are unlabelled.
    """
    for _ in range(12):
        source, row = _choose(rng, photographs)
        height, width = source.records.sizes[row].tolist()
        largest = min(height / size[0], width / size[1])
        if largest * config.scales[1] < 1:
            continue
        # Windows nearly as large as fits, so that most of the photograph's entities stay whole.
        ratio = largest * max(rng.uniform(0.6, 1.0), min(1.0, 1 / (largest * config.scales[1])))
        window = [
            min(max(int(round(side * ratio)), 1), limit) for side, limit in zip(size, (height, width), strict=True)
        ]
        y, x = (int(rng.integers(limit - side + 1)) for side, limit in zip(window, (height, width), strict=True))
        name, image, labels = source.labels(row)
        # The box is one of the mirrored photograph, where any place is as likely.
        view = transforms.View((x, y, x + window[1], y + window[0]), size, flip=bool(rng.random() < 0.5))
        labels = transforms.view_labels(labels, view)
        labels = np.where((np.bincount(labels.ravel()) >= least)[labels], labels, 0)
        if (labels == 0).mean() <= config.max_unlabelled:
            return name, transforms.view_image(image, view), labels
    return None


def _patches(rng, count: int, size: tuple[int, int], photographs, config: CollageConfig) -> list[Patch]:
    """Cut-outs in place, in painting order: large ones tend to lie behind."""
    keyed: list[tuple[float, Patch]] = []
    for _ in range(20 * count):
        if len(keyed) >= count:
            break
        source, row = _choose(rng, photographs)
        cut = source.cut_out(rng, row)
        if cut is None:
            continue
        # Some come as a herd.
        copies = min(int(rng.integers(2, 6)), count - len(keyed)) if rng.random() < 0.12 else 1
        area = float(np.exp(rng.uniform(*np.log(config.areas))))
        area = area if copies == 1 else min(area, 0.03)
        place, matrix = rng.random(2), augment.random_colour_matrix(rng, rng.uniform(0, 0.7))
        for _ in range(copies):
            patch = _patch(rng, cut, area * rng.uniform(0.8, 1.25), place, size, matrix, config)
            if patch is None:
                break
            keyed.append((-np.log(patch.inside.sum() + 1) + 0.8 * rng.standard_normal(), patch))
            place = place + rng.normal(0, 0.12, 2)
    return [patch for _, patch in sorted(keyed, key=lambda pair: pair[0])]


def _patch(rng, cut: CutOut, area: float, place, size, matrix, config: CollageConfig) -> Patch | None:
    """Scaled, mirrored, turned and coloured."""
    scale = np.sqrt(area * size[0] * size[1] / cut.mask.sum()) * np.exp(0.1 * rng.standard_normal())
    scale = float(np.clip(scale, *config.scales))
    new = [max(int(round(side * scale)), 4) for side in cut.mask.shape]
    image = Image.fromarray(augment.change_colour(cut.image, matrix)).resize(new[::-1], BILINEAR)
    mask = Image.fromarray(cut.mask.view(np.uint8) * np.uint8(255)).resize(new[::-1], BILINEAR)
    left, top, right, bottom = cut.cut
    if rng.random() < 0.5:
        image, mask = (each.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for each in (image, mask))
        left, right = right, left
    # What its photograph's border cut off goes to the same border here, and is not turned.
    if not any(cut.cut):
        angle = rng.uniform(-40, 40) if rng.random() < 0.15 else rng.normal(0, 7)
        nearest = tuple(int(value) for value in np.asarray(image).reshape(-1, 3).mean(0))
        image = image.rotate(angle, Image.Resampling.BICUBIC, expand=True, fillcolor=nearest)
        mask = mask.rotate(angle, BILINEAR, expand=True)
    alpha = ndimage.gaussian_filter(np.asarray(mask, np.float32) / 255, FEATHER)
    alpha[alpha < 0.02] = 0
    if not (alpha >= 0.5).any():
        return None
    height, width = alpha.shape
    x, y = int(place[0] * size[1] - width / 2), int(place[1] * size[0] - height / 2)
    # Two or three pixels further out: the frame of the cut-out is empty, and its edge soft.
    margin = 2 + int(np.ceil(3 * scale))
    x = -margin if left else size[1] - width + margin if right else x
    y = -margin if top else size[0] - height + margin if bottom else y
    return Patch(np.asarray(image), alpha, (x, y), cut.file_name)


def _overlap(patch: Patch, size: tuple[int, int]) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """The part of the patch that lies in the picture, and where."""
    (x, y), (height, width) = patch.corner, patch.alpha.shape
    x0, y0, x1, y1 = max(x, 0), max(y, 0), max(min(x + width, size[1]), 0), max(min(y + height, size[0]), 0)
    x1, y1 = max(x0, x1), max(y0, y1)
    return (slice(y0 - y, y1 - y), slice(x0 - x, x1 - x)), (slice(y0, y1), slice(x0, x1))


def _visible_patches(patches: list[Patch], background: Background, config: CollageConfig) -> list[Patch]:
    """Those of which enough is to be seen, and that leave no sliver of an entity of the background."""
    labels = background.labels
    least, before = config.min_area * labels.size, np.bincount(labels.ravel())
    while True:
        owner = np.zeros(labels.shape, np.int32)
        for number, patch in enumerate(patches, start=1):
            own, theirs = _overlap(patch, labels.shape)
            owner[theirs][patch.inside[own]] = number
        visible = np.bincount(owner.ravel(), minlength=len(patches) + 1)[1:]
        whole = np.array([patch.inside.sum() for patch in patches])
        drop = (visible < least) | (visible < MIN_VISIBLE * whole)
        if not drop.any():
            after = np.bincount(labels[owner == 0], minlength=len(before))
            slivers = np.flatnonzero((after > 0) & (after < least) & (after < before))
            for sliver in slivers[slivers > 0][:1]:
                covering = np.bincount(owner[labels == sliver], minlength=len(patches) + 1)[1:]
                drop[int(np.argmax(covering))] = True
        if not drop.any():
            return patches
        patches = [patch for patch, dropped in zip(patches, drop, strict=True) if not dropped]


def _compact(labels: np.ndarray, min_area: float) -> tuple[np.ndarray, int]:
    """Labels 1..count of the entities that show at least `min_area`, and count."""
    areas = np.bincount(labels.ravel())
    kept = areas >= max(min_area * labels.size, 1)
    kept[0] = False
    return np.where(kept, np.cumsum(kept), 0)[labels], int(kept.sum())


def write_collages(
    out: str | Path,
    count: int,
    sources: Sequence[CollageSource],
    seed: int = 0,
    config: CollageConfig | None = None,
    workers: int = 1,
) -> Path:
    """Makes `count` collages in `out`, unless they are there; gives the path of `annotations.json`.

    Every image lists under ``sources`` the photographs it shows; the file lists all of them under ``sources``, with
    whatever their own file says about source, licence and address, and ``licenses`` by name.

    Raises:
        ValueError: `out` holds collages of another seed, configuration or sources; and as `make_collage`.
    """
    config, sources = config or CollageConfig(), tuple(sources)
    files = [
        {
            "annotations": Path(source.annotations).name,
            "sha256": hashlib.sha256(_bytes(source.annotations)).hexdigest()[:16],
            "background": source.background,
        }
        for source in sources
    ]
    open_photographs(sources)  # complains before anything is written
    return write_pictures(
        out,
        count,
        functools.partial(_numbered, seed=seed, sources=sources, config=config),
        info={
            "description": "copy-paste collages",
            "version": VERSION,
            "seed": seed,
            "config": dataclasses.asdict(config),
            "files": files,
        },
        defaults=dataclasses.asdict(CollageConfig()),
        kind="collages",
        workers=workers,
        tables=functools.partial(_provenance, sources=sources),
    )


def _bytes(file: str) -> bytes:
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"annotation file not found: {file}")
    return path.read_bytes()


def _numbered(index: int, seed: int, sources: tuple[CollageSource, ...], config: CollageConfig) -> Picture:
    return make_collage((seed, index), sources, config)


def _provenance(images: Sequence[Mapping[str, Any]], sources: Sequence[CollageSource]) -> dict[str, Any]:
    used = {name for image in images for name in image["sources"]}
    rows: dict[str, dict[str, Any]] = {}
    licences: dict[Any, dict[str, Any]] = {}
    for source in sources:
        content = read_json(source.annotations)
        known = {licence["id"]: licence for licence in content.get("licenses") or ()}
        for image in content["images"]:
            if image["file_name"] in used:
                keys = ("file_name", "source", "source_id", "id", "license", "flickr_url")
                rows[image["file_name"]] = {key: image[key] for key in keys if key in image}
                if image.get("license") in known:
                    licences[image["license"]] = known[image["license"]]
    return {
        "licenses": [licences[number] for number in sorted(licences)],
        "sources": [rows[name] for name in sorted(rows)],
    }


def parse_source(text: str) -> CollageSource:
    """ANNOTATIONS,IMAGES[,cut]. Raises ValueError for another form."""
    parts = text.split(",")
    if len(parts) not in (2, 3) or (len(parts) == 3 and parts[2] != "cut"):
        raise ValueError(f"--source {text!r}; write ANNOTATIONS,IMAGES or ANNOTATIONS,IMAGES,cut")
    return CollageSource(parts[0], parts[1], background=len(parts) == 2)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.collage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = CollageConfig()
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--count", type=int, required=True, help="number of collages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--source", required=True, action="append", metavar="ANNOTATIONS,IMAGES[,cut]", help="may be repeated"
    )
    parser.add_argument("--long-side", type=int, nargs=2, default=default.long_side, metavar=("MIN", "MAX"))
    parser.add_argument("--entities", type=int, nargs=2, default=default.entities, metavar=("MIN", "MAX"))
    parser.add_argument("--min-area", type=float, default=default.min_area, help="that an entity shows, as a fraction")
    parser.add_argument("--textured", type=float, default=default.textured, help="share of rendered backgrounds")
    parser.add_argument("--max-unlabelled", type=float, default=default.max_unlabelled, help="of a background")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    arguments = parser.parse_args()
    try:
        config = CollageConfig(
            long_side=tuple(arguments.long_side),
            entities=tuple(arguments.entities),
            min_area=arguments.min_area,
            textured=arguments.textured,
            max_unlabelled=arguments.max_unlabelled,
        )
        sources = [parse_source(text) for text in arguments.source]
        print(write_collages(arguments.out, arguments.count, sources, arguments.seed, config, arguments.workers))
    except (ValueError, FileNotFoundError, ImageError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
