"""The main job from end to end on embedded data: render scenes, train, predict photographs, evaluate, draw.

    make quickstart

Every step is the public command, printed before it runs. Steps that are done are not repeated, and training goes on
from its last checkpoint, so an interrupted run loses nothing.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import imgviz
import skimage.data
from PIL import Image

TRAIN_SCENES, VAL_SCENES = 160, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/quickstart"), help="everything is written here")
    parser.add_argument(
        "--minutes", type=float, default=11, help="training stops here on a slow machine; calling again goes on"
    )
    arguments = parser.parse_args()
    workdir = arguments.workdir
    started = time.monotonic()
    python = sys.executable
    train, val, photos, predictions = (workdir / name for name in ("scenes", "scenes_val", "photos", "predictions"))

    # Small renders for training, whose views have 256 pixels; full-size ones for evaluation, where the crops count.
    scenes = [python, "-m", "data.scenes", "--out"]
    run("1/5 training scenes", scenes + [train, "--count", TRAIN_SCENES, "--long-side", 800, 1100])
    run("2/5 validation scenes", scenes + [val, "--count", VAL_SCENES, "--seed", 1])
    config = f"--config=configs/quickstart.py:{train}"
    run(
        "3/5 training",
        [python, "train.py", config, f"--workdir={workdir}", f"--config.loop.max_minutes={arguments.minutes}"],
    )
    write_photos(photos)
    weights = workdir / "model.safetensors"
    predict = [python, "-m", "esg_jax.cli", "predict"]
    run(
        "4/5 entities of photographs",
        predict + [photos, "--checkpoint", weights, "--out", predictions, "--score-mode", "entityness"],
    )
    run("5/5 evaluation", [python, "eval.py", f"--config=configs/recipes/scenes.py:{val}", f"--workdir={workdir}"])
    summarize(workdir, predictions, (time.monotonic() - started) / 60)


def run(title: str, command: list) -> None:
    """Runs one step in the foreground; leaves with its message if it fails."""
    command = [str(word) for word in command]
    shown = shlex.join(["python" if word == sys.executable else word for word in command])
    print(f"\n== step {title}\n$ {shown}", flush=True)
    status = subprocess.run(command).returncode
    if status:
        sys.exit(f"step {title} failed (status {status}); mend the cause above and run `make quickstart` again")


def write_photos(folder: Path) -> None:
    """Photographs that packages ship, as files."""
    folder.mkdir(parents=True, exist_ok=True)
    images = {name: getattr(skimage.data, name)() for name in ("astronaut", "chelsea", "coffee")}
    images["living_room"] = imgviz.data.voc()["rgb"]
    for name, image in images.items():
        Image.fromarray(image).save(folder / f"{name}.png")


def summarize(workdir: Path, predictions: Path, minutes: float) -> None:
    """What came out, where it is, and what to do next."""
    metrics = json.loads((workdir / "eval" / "results.json").read_text())["metrics"]
    print(f"""
Done in {minutes:.1f} minutes. On {VAL_SCENES} scenes the model has not seen:
  AP^e {100 * metrics["AP"]:.1f}    AR@100 at IoU 0.5 {100 * metrics["AR@100@IoU0.5"]:.1f}
Pictures:
  {workdir / "eval" / "grid.png"}  predictions beside the truth
  {predictions}  entities of photographs
Next:
  esg predict YOUR_PHOTO.jpg --out out
      entities of your photograph, by the packaged model
  python -m data.demo_mix --out datasets/demo && python train.py --config=configs/demo.py:datasets/demo \\
      --workdir=runs/demo
      the same model, trained for longer
  python train.py --config=configs/finetune.py:{workdir / "model.safetensors"} --workdir=runs/mine \\
      --config.data.sources.mine.annotations=MASKS.json --config.data.sources.mine.images=FOLDER
      fine-tuned on your masks, docs/finetuning.md
(First: source .venv/bin/activate)""")


if __name__ == "__main__":
    main()
