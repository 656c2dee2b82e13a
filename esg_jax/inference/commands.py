"""`esg predict`: entity masks of photographs."""

import argparse
import json
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

FORMATS = ("overlay", "labels", "json", "npz")
OK, FAILED, USAGE = 0, 1, 2

_DESCRIPTION = """\
Finds the entities of one image or of every image in a folder, and writes for each NAME into --out

  overlay  NAME_overlay.png   the photograph with tinted, outlined entities and their scores
  labels   NAME_labels.png    label map of the original size: 0 = none, 1 = best entity, 2 = ...
  npz      NAME.npz           label_map, scores, class_scores, labels, queries (numpy)
  json     predictions.json   one COCO file for all images (RLE masks with scores)

A bad file is reported at the end and the job goes on; the exit status is 1 when any failed, 2 for a wrong command."""

_EXAMPLES = """\
examples:
  esg predict photo.jpg --out masks                            the weights that ship with the package
  esg predict photos/ --out masks --threshold 0.3              keep less certain entities, too
  esg predict photos/ --out masks --views 1                    five times faster: no corner crops
  esg predict photos/ --out masks --checkpoint swin_l.safetensors --precision bfloat16 --batch-size 4
  esg predict val/ --out pred --threshold 0 --formats json --image-ids val.json
  esg evaluate entity-ap --gt val.json --pred pred/predictions.json"""


def add_parsers(subparsers: Any) -> None:
    """Adds `predict` to the `esg` command; it sets `run(args) -> exit status`."""
    parser = subparsers.add_parser(
        "predict",
        help="entity masks of an image or a folder",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("path", metavar="IMAGE_OR_FOLDER", type=Path, help="an image file, or a folder of them (not searched deeper)")
    add("--out", metavar="DIR", type=Path, required=True, help="folder for the results; created when missing")
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
    add("--batch-size", type=positive, default=1, metavar="N",
        help="images per step, split over the local devices (default: 1)")  # fmt: skip
    add("--precision", choices=("float32", "bfloat16"), default="float32",
        help="of the computation (default: float32; bfloat16 is faster on GPU and TPU)")  # fmt: skip
    add("--image-ids", metavar="FILE", type=Path,
        help="COCO JSON that gives the images' ids, by file name (default: 1, 2, ...)")  # fmt: skip
    add("--strict", action="store_true", help="stop at the first bad file")
    parser.set_defaults(run=run)


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


def positive(text: str) -> int:
    """Argument type: an integer from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def run(args: argparse.Namespace) -> int:
    """Predicts; returns the exit status."""
    from esg_jax.input.image_io import list_images

    try:
        images = list_images(args.path)
        image_ids = _read_image_ids(args.image_ids, images)
        args.out.mkdir(parents=True, exist_ok=True)
        predictor = _make_predictor(args)
    except (FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError, ValueError) as error:
        print(f"esg predict: {error}", file=sys.stderr)
        return USAGE
    job = _Job(args, images, image_ids)
    started = time.monotonic()
    try:
        finished = job.run(predictor)
    finally:  # also after Ctrl-C: what is done is not lost
        job.close()
    job.report(time.monotonic() - started)
    return OK if finished and not job.failures else FAILED


def _make_predictor(args: argparse.Namespace):
    import jax
    import jax.numpy as jnp

    from esg_jax.inference.entities.predictor import Predictor

    return Predictor.from_checkpoint(
        args.checkpoint,
        dtype=getattr(jnp, args.precision),
        views=args.views,
        min_size=args.min_size,
        max_size=args.max_size,
        score_mode=args.score_mode,
        buckets=args.buckets,
        devices=jax.local_devices()[: args.batch_size],
    )


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


class _Job:
    """Runs the images through the predictor and writes their files."""

    def __init__(self, args: argparse.Namespace, images: list[Path], image_ids: list[int]):
        from esg_jax.inference.entities.entity_files import CocoFile

        self.args, self.images, self.image_ids = args, images, image_ids
        self.stems = unique_stems(images)
        self.coco = CocoFile()
        self.failures: list[tuple[Path, Exception]] = []
        self.done = self.entities = 0
        self.best_score = 0.0

    def run(self, predictor) -> bool:
        """False when `--strict` stopped the job."""
        from concurrent.futures import Future, ThreadPoolExecutor

        # Files are drawn and compressed while the next images are predicted; at most four wait.
        writing: deque[tuple[int, Future]] = deque()
        with progress(len(self.images), "predicting") as advance, ThreadPoolExecutor(2) as pool:
            for index, result in predictor.predict_many(self.images, batch_size=self.args.batch_size):
                if isinstance(result, Exception):
                    self.failures.append((self.images[index], result))
                else:
                    writing.append((index, pool.submit(self._write, index, result)))
                while len(writing) > 4:
                    self._settle(*writing.popleft())
                if self.failures and self.args.strict:
                    break
                advance()
            while writing:
                self._settle(*writing.popleft())
        return not (self.failures and self.args.strict)

    def _settle(self, index: int, job) -> None:
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

        self.best_score = max(self.best_score, float(prediction.scores.max(initial=0)))
        kept = prediction.above(self.args.threshold)
        base = self.args.out / self.stems[index]
        if "overlay" in self.args.formats:
            entity_files.write_overlay(f"{base}_overlay.png", load_image(self.images[index]), kept)
        if "labels" in self.args.formats:
            entity_files.write_label_map(f"{base}_labels.png", kept)
        if "npz" in self.args.formats:
            entity_files.write_arrays(f"{base}.npz", kept)
        return kept

    def close(self) -> None:
        if "json" in self.args.formats and self.done:
            self.coco.write(self.args.out / "predictions.json")

    def report(self, seconds: float) -> None:
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
        for path, error in self.failures:
            message = str(error)
            print(f"failed: {message if path.name in message else f'{path}: {message}'}", file=sys.stderr)
        if self.failures:
            stopped = ", stopped at the first (--strict)" if self.args.strict else ""
            print(f"{len(self.failures)} of {len(self.images)} images failed{stopped}", file=sys.stderr)


def unique_stems(images: list[Path]) -> list[str]:
    """Output names: the stem, or the whole name where two images share a stem."""
    stems = [image.stem for image in images]
    return [image.name if stems.count(image.stem) > 1 else image.stem for image in images]


def progress(total: int, text: str):
    """Context manager that yields `advance()`; a bar with the time left, only when attached to a terminal."""
    import contextlib

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    @contextlib.contextmanager
    def bar():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as shown:
            task = shown.add_task(f"compiling, then {text}", total=total)

            def advance() -> None:
                shown.update(task, advance=1, description=text)

            yield advance

    return bar()
