"""`esg predict`: entity masks of photographs."""

import argparse
import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from esg_jax.cli.image_job import ImageJob, add_image_arguments, mesh_of, run_job

FORMATS = ("overlay", "labels", "json", "npz")

DESCRIPTION = """\
Finds the entities of one image or of every image in a folder, and writes for each NAME into --out

  overlay  NAME_overlay.png   the photograph with tinted, outlined entities and their scores
  labels   NAME_labels.png    label map of the original size: 0 = none, 1 = best entity, 2 = ...
  npz      NAME.npz           masks (label map), scores, class_scores, labels, queries (numpy)
  json     predictions.json   one COCO file for all images (RLE masks with scores)

A bad file is reported at the end and the job goes on; the exit status is 1 when any failed, 2 for a wrong command."""

EXAMPLES = """\
examples:
  esg predict photo.jpg --out masks                            the weights that ship with the package
  esg predict photos/ --out masks --threshold 0.3              keep less certain entities, too
  esg predict photos/ --out masks --views 1                    five times faster: no corner crops
  esg predict photos/ --out masks --checkpoint swin_l.safetensors --precision bfloat16 --batch-size 4
  esg predict val/ --out pred --threshold 0 --formats json --image-ids val.json
  esg evaluate entity-ap --gt val.json --pred pred/predictions.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Images, model, and what is kept of the entities."""
    add_image_arguments(parser)
    add = parser.add_argument
    add(
        "--checkpoint",
        metavar="FILE",
        type=Path,
        help="weights of ours or any PyTorch checkpoint that `esg convert` reads; default: the packaged demo weights",
    )
    add("--formats", type=_formats, default=["overlay", "labels", "json"], metavar="LIST",
        help="comma-separated choice of overlay,labels,json,npz, or all (default: overlay,labels,json)")  # fmt: skip
    add("--threshold", type=float, default=0.5, metavar="S",
        help="keep entities with a score of at least S (default: 0.5, as the reference demo; 0 keeps all, as "
        "evaluation needs). Reference scores never exceed 0.731")  # fmt: skip
    add("--score-mode", choices=("reference", "quality", "entityness"), default="reference",
        help="reference: class score x doubly squashed mask quality, as published numbers (default); quality: class "
        "score x mean mask probability; entityness: class score alone, as in the paper")  # fmt: skip
    add("--views", type=int, choices=(1, 5),
        help="5: the whole image and four corner crops (default where the model can); 1: the whole image")  # fmt: skip
    add("--min-size", type=int, metavar="PX", help="short side of the network's views (default: the model's, or 800)")
    add("--max-size", type=int, metavar="PX", help="limit of their long side (default: the model's, or 1333)")
    add("--buckets", type=_buckets, default=(), metavar="HxW,...",
        help="pad views to the smallest of these sizes (multiples of 32) instead of the next multiples of 32: fewer "
        "compilations for folders of mixed shapes, slightly different masks")  # fmt: skip
    add("--image-ids", metavar="FILE", type=Path,
        help="COCO JSON that gives the images' ids, by file name (default: 1, 2, ...)")  # fmt: skip


def _formats(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = sorted(set(names) - set(FORMATS) - {"all"})
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"unknown format {', '.join(unknown) or repr(text)}; choose of {FORMATS}")
    return list(FORMATS) if "all" in names else names


def _buckets(text: str) -> tuple[tuple[int, int], ...]:
    try:
        sizes = [tuple(int(side) for side in size.lower().split("x")) for size in text.split(",")]
        return tuple((height, width) for height, width in sizes)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected sizes like 800x1088,1088x800") from error


def run(args: argparse.Namespace) -> int:
    """Predicts; returns the exit status."""
    return run_job("predict", _Job, args)


def _read_image_ids(path: Path | None, images: list[Path]) -> list[int]:
    if path is None:
        return list(range(1, len(images) + 1))
    try:
        listed = [(Path(image["file_name"]), image["id"]) for image in json.loads(path.read_text())["images"]]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"--image-ids {path} is no readable COCO JSON with `images`: {error!r}") from error
    by_name: dict[str, list[tuple[Path, int]]] = {}
    for file_name, image_id in listed:
        by_name.setdefault(file_name.name, []).append((file_name, image_id))
    return [_image_id(image, by_name.get(image.name, []), path) for image in images]


def _image_id(image: Path, candidates: list[tuple[Path, int]], listing: Path) -> int:
    """The candidate with the same name; of several, the one that names most of the image's folders."""
    if len(candidates) > 1:
        parts = image.resolve().parts
        candidates = [pair for pair in candidates if parts[-len(pair[0].parts) :] == pair[0].parts]
        deepest = max((len(pair[0].parts) for pair in candidates), default=0)
        candidates = [pair for pair in candidates if len(pair[0].parts) == deepest]
    if len(candidates) != 1:
        raise ValueError(f"--image-ids {listing} lists {len(candidates)} images that could be {image}, expected one")
    return candidates[0][1]


class _Job(ImageJob):
    """Runs the images through the predictor and writes their files."""

    activity = "predicting"

    def __init__(self, args: argparse.Namespace):
        from esg_jax.inference.entities.predictor import Predictor
        from esg_jax.masks.write import CocoFile

        super().__init__(args)
        self.image_ids = _read_image_ids(args.image_ids, self.images)
        names = ("views", "min_size", "max_size", "score_mode", "buckets")
        options = {name: getattr(args, name) for name in names}
        self.predictor = Predictor.from_checkpoint(args.checkpoint, dtype=args.precision, mesh=mesh_of(args), **options)
        self.coco = CocoFile()
        self.done = self.entities = 0
        self.best_score = 0.0

    def work(self) -> Iterator[None]:
        """Predicts; files are drawn and compressed while the next images are predicted, at most four wait."""
        writing: deque[tuple[int, Future]] = deque()
        with ThreadPoolExecutor(2) as pool:
            try:
                for index, result in self.predictor.predict_many(self.images, batch_size=self.args.batch_size):
                    if isinstance(result, Exception):
                        self.failures.append((self.images[index], result))
                    else:
                        writing.append((index, pool.submit(self._write, index, result)))
                    while len(writing) > 4:
                        self._settle(*writing.popleft())
                    yield
            finally:
                while writing:
                    self._settle(*writing.popleft())

    def _settle(self, index: int, job: Future) -> None:
        try:
            kept = job.result()
        except (OSError, ValueError) as error:
            self.failures.append((self.images[index], error))
            return
        if "json" in self.args.formats:
            self.coco.add(kept, self.images[index].name, self.image_ids[index])
        self.done += 1
        self.entities += len(kept)

    def _write(self, index: int, prediction):
        from esg_jax.inference.entities import entity_files
        from esg_jax.input.image_io import load_image
        from esg_jax.masks.write import write_arrays

        self.best_score = max(self.best_score, float(prediction.scores.max(initial=0)))
        kept = prediction.above(self.args.threshold)
        base = self.args.out / self.stems[index]
        if "overlay" in self.args.formats:
            entity_files.write_overlay(f"{base}_overlay.png", load_image(self.images[index]), kept)
        if "labels" in self.args.formats:
            entity_files.write_label_map(f"{base}_labels.png", kept)
        if "npz" in self.args.formats:
            write_arrays(f"{base}.npz", kept, ("scores", "class_scores", "labels", "queries"))
        return kept

    def close(self) -> None:
        """Writes the COCO file."""
        if "json" in self.args.formats and self.done:
            self.coco.write(self.args.out / "predictions.json")

    def summary(self, seconds: float) -> None:
        """Counts images and entities."""
        if self.done:
            print(
                f"{self.done} image{'s' * (self.done != 1)}, {self.entities} entities in {seconds:.0f} s; "
                f"{', '.join(self.args.formats)} in {self.args.out}"
            )
            if not self.entities:
                print(
                    f"no entity reached the threshold {self.args.threshold:g}, the best score was "
                    f"{self.best_score:.2f}: try a lower --threshold"
                )
