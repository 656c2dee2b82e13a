"""`esg ground`: which masks a text speaks of."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from esg_jax.cli.image_job import ImageJob, add_image_arguments, mesh_of, positive, run_job

DESCRIPTION = """\
Finds the entities that a text speaks of, in one image or in every image of a folder. Say what to ground with one of

  --caption            the model describes the image and grounds its own nouns
  --text TEXT          the nouns of TEXT (found by the model or a rule, or exactly those of --phrases)
  --refer TEXT         the one thing that TEXT refers to, "not found" when nothing fits
  --question TEXT      what answers the question
  --categories NAMES   every entity gets one of these names (a,b,c or a file with a name per line)

Masks come from the packaged CropFormer, or from anywhere else with --masks. Written into --out

  NAME_grounding.png   the photograph, every phrase in the colour of its masks, what was not found struck through
  grounding.json       per image: phrases with span, mask ids, scores and RLE, and all entities

A bad file is reported at the end and the job goes on; the exit status is 1 when any failed, 2 for a wrong command."""

EXAMPLES = """\
examples:
  esg ground photo.jpg --out found --text "a dog next to two red chairs" --phrases dog "two red chairs"
  esg ground photo.jpg --out found --refer "the cup on the left" --masks photo_masks.png
  esg ground photos/ --out found --caption --batch-size 4
  esg ground photos/ --out found --categories names.txt --stuff sky,road --masks masks/
  esg ground photo.jpg --out found --model gella.safetensors --tokenizer tokenizer.model --question "What can I sit on?"

--masks takes a PNG label map (0 = nothing), a JSON list of COCO RLEs, a COCO JSON (also predictions.json of `esg
predict`), .npy or .npz, or a folder of binary PNGs; for a folder of images a folder with one of these per image,
named like it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Images, what is asked, where masks come from, and the model."""
    add_image_arguments(parser)
    add = parser.add_argument
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--caption", action="store_true", help="describe the image, then ground the description")
    task.add_argument("--text", metavar="TEXT", help="ground the nouns of TEXT")
    task.add_argument("--refer", metavar="TEXT", help="find the one thing that TEXT refers to")
    task.add_argument("--question", metavar="TEXT", help="find what answers the question")
    task.add_argument("--categories", metavar="NAMES", help="a,b,c or a file with a name per line")
    add("--phrases", nargs="+", metavar="PHRASE", help="with --text: its noun phrases, instead of the model's list")
    add("--nouns", choices=("model", "rule"), help="who finds noun phrases that are not given: the model, or a rule of "
        "function words and endings (default: what the weights say; rule for an untrained language model)")  # fmt: skip
    add("--answer", action="store_true", help="with --question: let the model answer in its own words")
    add("--stuff", metavar="NAMES", default="", help="with --categories: those that are not countable (a,b or a file); "
        "their entities are merged")  # fmt: skip
    add("--instances", action="store_true", help="with --categories: scored instances, several classes per entity")
    masks = parser.add_argument_group("masks")
    masks.add_argument("--masks", metavar="PATH", type=Path, help="masks from elsewhere, see below")
    masks.add_argument("--overlap", choices=("score", "area", "logit"), default="score",
        help="who owns contested pixels: the best score (default), the smallest mask, or the largest score x "
        "probability")  # fmt: skip
    masks.add_argument("--min-area", type=positive, default=1, metavar="PX", help="drop smaller masks (default: 1)")
    masks.add_argument("--segmenter", metavar="FILE", type=Path,
        help="CropFormer checkpoint that makes the masks (default: the packaged demo weights)")  # fmt: skip
    masks.add_argument("--mask-threshold", type=float, default=0.3, metavar="S",
        help="use its entities with a score of at least S (default: 0.3)")  # fmt: skip
    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="FILE", type=Path, help="GELLA weights (default: the packaged demo weights)")
    model.add_argument("--tokenizer", metavar="FILE", help="tokenizer file or folder of the model's language model, or "
        "'smollm2' for the packaged one (default: what the weights say)")  # fmt: skip
    model.add_argument("--conversation", metavar="STYLE", help="vicuna or chatml (default: what the weights say)")
    model.add_argument("--prompts", metavar="FILE", type=Path, help="YAML with the wording the model was trained with")
    model.add_argument("--rule", action="append", default=[], metavar="NAME=VALUE",
        help="a field of GroundingConfig: threshold=0.4, refer_merge=threshold, "
        "output_masks=reconstructed, ...")  # fmt: skip
    model.add_argument("--max-new-tokens", type=positive, default=256, metavar="N", help="longest answer (256)")
    add("--no-pictures", action="store_true", help="write the JSON only")


def run(args: argparse.Namespace) -> int:
    """Grounds; returns the exit status."""
    return run_job("ground", _Job, args)


def open_grounder(args: argparse.Namespace):
    """The model with its tokenizer and wording; what the command line leaves open is looked up in the weights."""
    from esg_jax.inference.grounding.decisions import read_rules
    from esg_jax.inference.grounding.grounder import Grounder

    names = ("tokenizer", "conversation", "prompts", "nouns", "batch_size", "max_new_tokens")
    options = {name: getattr(args, name) for name in names}
    rules = read_rules(args.rule, "--rule")
    return Grounder.from_checkpoint(args.model, dtype=args.precision, mesh=mesh_of(args), rules=rules, **options)


def _names(text: str | None, option: str) -> list[str]:
    if not text:
        return []
    path = Path(text)
    if path.suffix == ".txt" or path.is_file():
        if not path.is_file():
            raise FileNotFoundError(f"{option}: no file {path}")
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    return [name.strip() for name in text.split(",") if name.strip()]


def _check(args: argparse.Namespace, names: list[str], stuff: list[str]) -> None:
    """Combinations that argparse cannot see, before anything slow is loaded."""
    for option, allowed in (("phrases", "text"), ("answer", "question"), ("stuff", "categories"),
                            ("instances", "categories")):  # fmt: skip
        if getattr(args, option) and not getattr(args, allowed):
            raise ValueError(f"--{option} goes with --{allowed}")
    if args.categories is not None and not names:
        raise ValueError("--categories is empty")
    unknown = [name for name in stuff if name not in names]
    if unknown:
        raise ValueError(f"--stuff names {unknown[0]!r}, which --categories lacks")
    for option in ("text", "refer", "question"):
        text = getattr(args, option)
        if text is not None and not text.strip():
            raise ValueError(f"--{option} is empty")


class _Masks:
    """Where the masks of an image come from: files, or a segmenter."""

    def __init__(self, args: argparse.Namespace, images: list[Path], stems: list[str]):
        from esg_jax.masks import mask_file_of

        self.args, self.predictor = args, None
        self.files: dict[Path, Path] = {}
        path = args.masks
        if path is None:
            return
        if not path.exists():
            raise FileNotFoundError(f"--masks: no such file or folder: {path}")
        whole = path.suffix == ".json" or len(images) == 1
        if path.is_file() and not whole:
            raise ValueError(f"--masks {path} is one file for {len(images)} images; give a COCO JSON or a folder")
        for image, stem in zip(images, stems, strict=True):
            try:
                self.files[image] = mask_file_of(path, stem)
            except FileNotFoundError:
                if len(images) > 1:
                    raise
                self.files[image] = path  # a folder of binary pictures

    def open(self, max_entities: int) -> None:
        """Loads the segmenter, when there are no files."""
        self.max_entities = max_entities
        if not self.files:
            from esg_jax.inference.entities.predictor import Predictor

            self.predictor = Predictor.from_checkpoint(self.args.segmenter)

    def of(self, image: Path, pixels):
        """Disjoint entities of an image."""
        from esg_jax.masks import NoMasksError, disjoint_masks, read_masks

        if self.predictor is not None:
            prediction = self.predictor(pixels)
            kept = prediction.above(self.args.mask_threshold)
            if not len(kept):
                raise NoMasksError(
                    f"the segmenter found no entity with a score of {self.args.mask_threshold:g} or more in {image} "
                    f"(the best has {prediction.scores.max(initial=0):.2f}): lower --mask-threshold"
                )
            return disjoint_masks(kept, max_entities=self.max_entities)
        masks = read_masks(self.files[image], pixels.shape[:2], image.name)
        options = {"overlap": self.args.overlap, "min_area": self.args.min_area}
        return disjoint_masks(masks, max_entities=self.max_entities, **options)


class _Job(ImageJob):
    """Runs the images through the grounder and writes their files."""

    activity = "grounding"

    def __init__(self, args: argparse.Namespace):
        self.names, stuff = _names(args.categories, "--categories"), _names(args.stuff, "--stuff")
        _check(args, self.names, stuff)
        super().__init__(args)
        self.things = [name not in stuff for name in self.names]
        self.results: list[tuple[Path, Any]] = []
        self.masks = _Masks(args, self.images, self.stems)
        self.grounder = open_grounder(args)
        self.masks.open(self.grounder.max_entities)

    def work(self) -> Iterator[None]:
        """Grounds, a batch at a time."""
        from esg_jax.input.image_io import load_image

        batch: list[tuple[int, Any, Any]] = []
        for index, image in enumerate(self.images):
            try:
                pixels = load_image(image)
                batch.append((index, pixels, self.masks.of(image, pixels)))
            except (FileNotFoundError, ValueError) as error:
                self.failures.append((image, error))
                yield
            if len(batch) == self.args.batch_size or (batch and index + 1 == len(self.images)):
                self._ground(batch)
                for _ in batch:
                    yield
                batch = []

    def _ground(self, batch: list[tuple[int, Any, Any]]) -> None:
        from esg_jax.inference.grounding import grounding_files

        indices, pixels, masks = zip(*batch, strict=True)
        try:
            results = self._task(self.grounder.look(pixels, masks))
        except ValueError as error:  # of the text, so of every image
            self.failures += [(self.images[index], error) for index in indices]
            return
        for index, shown, result in zip(indices, pixels, results, strict=True):
            if not self.args.no_pictures:
                grounding_files.write_picture(self.args.out / f"{self.stems[index]}_grounding.png", shown, result)
            self.results.append((self.images[index], result))

    def _task(self, scenes) -> list[Any]:
        args, grounder, count = self.args, self.grounder, len(scenes)
        if args.categories:
            if args.instances:
                return grounder.instances(scenes, self.names)
            return grounder.panoptic(scenes, self.names, self.things)
        if args.refer:
            return grounder.refer(scenes, [args.refer] * count)
        if args.question:
            return grounder.reason(scenes, [args.question] * count, forced=not args.answer)
        phrases = [args.phrases] * count if args.phrases else None
        return grounder.ground(scenes, [args.text] * count, phrases)

    def close(self) -> None:
        """Writes the JSON."""
        if self.results:
            records = [{"image": image.name, **result.to_dict()} for image, result in self.results]
            (self.args.out / "grounding.json").write_text(json.dumps(records))

    def summary(self, seconds: float) -> None:
        """What was found, image by image when they are few."""
        for image, result in self.results if len(self.results) <= 10 else ():
            print(f"{image.name}: {_summary(result)}")
        if self.results:
            count = len(self.results)
            print(f"{count} image{'s' * (count != 1)} in {seconds:.0f} s; results in {self.args.out}")
        lost = sum(not result.scene.groundable.any() for _, result in self.results)
        if lost:
            print(
                f"in {lost} of {len(self.results)} images the model found none of the masks again, so nothing could be "
                "grounded: it is not trained enough, or the masks are smaller than its colormap shows"
            )


def _summary(result: Any) -> str:
    """One line for the terminal."""
    from esg_jax.inference.grounding.results import CategoryResult

    ids = result.scene.masks.ids
    if isinstance(result, CategoryResult):
        found = [f"{result.names[s.category]} {s.score:.2f}" for s in result.segments[:20]]
        return ", ".join(found) or "no entity is certain enough of any category"
    parts = []
    for phrase in result.phrases:
        if phrase.found:
            listed = ", ".join(f"{ids[e]} ({s:.2f})" for e, s in zip(phrase.entities, phrase.scores, strict=True))
            parts.append(f"{phrase.text!r}: mask {listed}")
        else:
            parts.append(f"{phrase.text!r}: not found (best {phrase.best_score:.2f})")
    text = f"{result.text!r} -> " if result.task in ("caption", "question") and result.text else ""
    return text + ("; ".join(parts) or "no noun was named")
