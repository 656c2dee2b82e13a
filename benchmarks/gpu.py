"""Everything that wants one NVIDIA GPU, in one command: kernels built, tested and timed, the demo model trained.

    python benchmarks/gpu.py --data train.arrayrecord --validation val.arrayrecord --minutes 10
    python benchmarks/gpu.py --wheels wheels --data train.arrayrecord     # where nothing can be downloaded
    python benchmarks/gpu.py --stages memcheck racecheck                  # only these; other results of --out stay
    python benchmarks/gpu.py --data mine.arrayrecord --config.data.batch_size=64   # --config.x.y=z go to train.py
    python benchmarks/gpu.py --dry-run                                    # tiny shapes, CPU will do

Stages run one after the other in processes of their own, what matters most first, each with a time limit. One that
fails or cannot run is reported, and the next one runs. After each, everything is on disk in --out: report.md,
report.json, log.txt and, once there are any, model.safetensors and metrics.jsonl. Training takes the time that is left
and goes on where it stopped when the command runs again. Needs an sm_80 GPU or newer, jax with CUDA, flax, optax and
orbax; nvcc, PyTorch, transformers and pytest for the stages that use them. Packed data: `python -m data.pack`.
"""

import argparse
import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from stages import Report, Runner, Stage

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
# What training needs beyond jax, by the name it is imported as.
PACKAGES = {
    "flax": "flax", "optax": "optax", "orbax.checkpoint": "orbax-checkpoint", "grain": "grain", "PIL": "pillow",
    "array_record": "array_record", "ml_collections": "ml_collections", "pycocotools": "pycocotools",
    "jaxtyping": "jaxtyping", "safetensors": "safetensors", "rich": "rich", "scipy": "scipy", "yaml": "pyyaml",
}  # fmt: skip
PROBE_STEPS = 100  # two intervals of the log, the first with the compilation
EXTRAS = ("torch", "transformers", "deformops", "pytest", "triton")


class Run:
    """The stages of one call, and what they share."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.dry = options.dry_run
        self.work = (options.work or options.out / "work").absolute()
        self.work.mkdir(parents=True, exist_ok=True)
        self.report = Report(options.out, options.minutes, self.dry)
        self.deadline = time.monotonic() + 60 * options.minutes
        self.site = self.work / f"site-{hashlib.sha256(repr(sorted(self.wheels())).encode()).hexdigest()[:8]}"
        self.train_folder = self.work / "train"
        self.pack, self.validation = (path and path.absolute() for path in (options.data, options.validation))
        self.pending: set[str] = set()
        self.runner = Runner(self.report, self.work, ROOT)

    @property
    def machine(self) -> dict:
        return self.report.content["machine"]

    def wheels(self) -> list[str]:
        return sorted(path.name for path in self.options.wheels.glob("*.whl")) if self.options.wheels else []

    def left(self) -> float:
        """Seconds for a stage now; training and evaluation, if still to come, keep their share."""
        reserve = 0.0
        if "train" in self.pending and self.pack:
            reserve += 60 * self.options.minutes * self.options.train_share
        if "evaluate" in self.pending and self.validation:
            reserve += min(90, 6 * self.options.minutes)
        return self.deadline - time.monotonic() - reserve

    def environment(self) -> dict[str, str]:
        paths = [str(ROOT), *([str(self.site)] if self.site.exists() else []), os.environ.get("PYTHONPATH", "")]
        values = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
        # The others share the device with PyTorch in one process; JAX would take most of its memory at once.
        values |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "HF_HUB_OFFLINE": "1"}
        values.setdefault("JAX_COMPILATION_CACHE_DIR", str(self.work / "xla"))
        values["JAX_PLATFORMS"] = "cpu" if self.dry else "cuda,cpu"
        return values

    def run(self, stage: Stage) -> None:
        self.pending.discard(stage.name)
        self.runner.run(stage, self.left(), self.environment())

    # Stages

    def stages(self) -> list[Stage]:
        tests = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/test_deform_attn.py"]
        attention = [PYTHON, "benchmarks/deform_attn.py"]
        model = [PYTHON, "benchmarks/cropformer_vs_torch.py"]
        if self.dry:
            kernels = [*tests, "-k", "test_locations and xla"]
            attention += ["--rounds", 1, "--no-torch-compile", "--shapes", "tiny"]
            model += ["--rounds", 1, "--no-memory", "--height", 64, "--width", 64, "--size", "tiny", "--entities", 4]
            table, table32 = [], []
        else:
            kernels = [*tests, "-m", "gpu"]
            table = ["--shapes", "encoder", "decoder300", "--dtype", "bfloat16"]
            table32 = ["--shapes", "encoder", "encoder4", "decoder900", "--no-torch-compile", "--model", 800, 1344]
            model += ["--rounds", 5, "--height", 800, "--width", 1344, "--dtype", "bfloat16"]
        sanitizer = [find_tool("compute-sanitizer"), "--error-exitcode", 9, "--report-api-errors", "no"]
        sanitizer += ["--target-processes", "all", "--kernel-name", "kns=deform_attn"]
        small = [*tests, "-m", "gpu", "-k", "locations or shapes or half"]
        # Every array an allocation of its own, or an access beyond it would go unnoticed in the pool.
        exact = {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform", "XLA_FLAGS": "--xla_gpu_enable_command_buffer="}

        def rows(name):
            return ["--json", self.work / f"{name}.json"]

        def sanitized(tool):
            refusal = lambda: self.needs_gpu() or self.without("compute-sanitizer", "pytest")()  # noqa: E731
            command = [*sanitizer, "--tool", tool, *small]
            return Stage(tool, f"compute-sanitizer {tool}, small shapes", 2.5, lambda: [command], refusal, exact)

        return [
            Stage(
                "build",
                "CUDA kernels built by nvcc",
                3,
                lambda: [[PYTHON, "-m", "esg_jax.ops.deform_attn.build_cuda"]],
                self.without("nvcc"),
            ),
            Stage("tests", "kernels against a float64 loop", 3, lambda: [kernels], self.without("pytest")),
            Stage(
                "attention",
                "deformable attention, all implementations",
                3,
                lambda: [[*attention, *table, *rows("attention")]],
                shows="all",
            ),
            Stage(
                "inference",
                "Swin-T inference: five views, and one",
                3,
                lambda: [[*model, "--tasks", "views", "forward", *rows("inference")]],
                shows="all",
            ),
            Stage(
                "step",
                "Swin-T training: forward, matching, losses, backward",
                3,
                lambda: [[*model, "--tasks", "train", *([] if self.dry else ["--batch", 2]), *rows("step")]],
                shows="all",
            ),
            Stage(
                "mosaic",
                "the Mosaic GPU kernel against a float64 loop",
                2,
                lambda: [[*tests, "-k", "pallas_gpu"]],
                lambda: self.needs_gpu(9.0) or self.without("pytest")(),
            ),
            sanitized("memcheck"),
            sanitized("racecheck"),
            Stage("train", "the demo model", 24 * 60, self.train_commands, self.no_training, shows="none", grace=60),
            Stage(
                "evaluate", "AP^e of the trained weights", 5, self.evaluate_commands, self.no_evaluation, shows="none"
            ),
            Stage(
                "attention32",
                "deformable attention in float32, alone and in five views by Swin-T",
                5,
                lambda: [[*attention, *table32, *rows("attention32")]],
                shows="all",
            ),
            # Last, because torch.compile may take minutes for a whole model.
            Stage(
                "compiled",
                "Swin-T once more, against torch.compile",
                15,
                lambda: [[*model, "--tasks", "forward", "train", "--torch-compile", *rows("compiled")]],
                self.no_compiled_peer,
                shows="all",
            ),
        ]

    def without(self, *tools: str) -> Callable[[], str | None]:
        def refusal():
            for tool in tools:
                installed = self.machine.get(tool) if tool == "pytest" else find_tool(tool)
                if not installed:
                    return f"{tool} was not found"
            return None

        return refusal

    def needs_gpu(self, capability: float = 0.0) -> str | None:
        if self.machine.get("platform") != "gpu":
            return "needs a GPU"
        if float(self.machine["capability"] or 0) < capability:
            return f"needs compute capability {capability}, this GPU has {self.machine['capability']}"
        return None

    def no_compiled_peer(self) -> str | None:
        return self.needs_gpu() or (None if self.machine["transformers"] else "transformers was not found")

    def no_training(self) -> str | None:
        if self.machine.get("missing"):
            return f"packages are missing: {', '.join(self.machine['missing'])} (--wheels, see docs/gpu.md)"
        if self.dry and self.pack is None:
            self.pack = self.work / "toy.arrayrecord"
            self.validation = self.validation or self.pack
        return None if self.pack else "no data: give --data FILE of `python -m data.pack`"

    def train_commands(self) -> Iterator[list]:
        """Some steps to learn the speed, then as many steps as fit, so that the schedule ends with the time."""
        if not self.pack.exists():
            yield [PYTHON, __file__, "--toy-pack", self.pack]
        config = f"configs/tiny.py:{self.work}" if self.dry else f"configs/gpu_demo.py:{self.pack}"
        command = [PYTHON, "train.py", f"--config={config}", f"--workdir={self.train_folder}"]
        if self.dry:
            file = next(self.pack.glob("*.arrayrecord")) if self.pack.is_dir() else self.pack
            source = {"reader": "packed", "annotations": file}
            command += [f"--config.data.sources.scenes.{key}={value}" for key, value in source.items()]
            command += [f"--config.loop.total_steps={self.last_metrics().get('step', 0) + 2}"]
            yield [*command, *self.options.train_options]
            return self.collect()
        command += self.options.train_options
        start, overhead = time.monotonic(), 90.0
        if "steps_per_s" not in self.last_metrics():
            yield [*command, f"--config.loop.total_steps={PROBE_STEPS}", "--config.optim.schedule=constant"]
            self.collect()
            overhead = time.monotonic() - start - PROBE_STEPS / self.last_metrics()["steps_per_s"]
        last, seconds = self.last_metrics(), self.left() - 30
        steps = int(last["steps_per_s"] * (seconds - overhead))  # start and compilation take as long again
        if steps > 0:
            limits = (
                f"--config.loop.total_steps={last['step'] + steps}",
                f"--config.loop.max_minutes={seconds / 60:.2f}",
            )
            yield [*command, *limits]
            self.collect()

    def last_metrics(self) -> dict:
        """The newest line of the training log that has a rate."""
        file = self.train_folder / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        rated = [line for line in lines if "steps_per_s" in line]
        return (rated or lines or [{}])[-1]

    def collect(self) -> None:
        """Weights and metrics so far to the folder of the report."""
        for name in ("model.safetensors", "metrics.jsonl"):
            if (self.train_folder / name).exists():
                shutil.copy(self.train_folder / name, self.options.out / name)
        wanted = ("step", "loss", "steps_per_s", "images_per_s", "tflops_per_s_per_chip", "mfu")
        last = self.last_metrics()
        self.report.content["training"] = {name: last[name] for name in wanted if name in last}

    def no_evaluation(self) -> str | None:
        self.collect()
        if self.validation is None:
            return "no data: give --validation FILE of `python -m data.pack`"
        return None if (self.train_folder / "model.safetensors").exists() else "there are no trained weights"

    def evaluate_commands(self) -> Iterator[list]:
        folder = self.work / "validation"
        yield [PYTHON, "-m", "data.pack", "--unpack", self.validation, "--out", folder]
        results = self.work / "evaluation"
        config, weights = f"--config=configs/recipes/scenes.py:{folder}", self.train_folder / "model.safetensors"
        yield [PYTHON, "eval.py", config, f"--checkpoint={weights}", f"--out={results}", "--views=5"]
        for name in ("results.json", "grid.png"):
            shutil.copy(results / name, self.options.out / f"evaluation_{name}")
        scores = "AP", "AP50", "AR@100@IoU0.5", "mean_best_iou"
        metrics = json.loads((results / "results.json").read_text())["metrics"]
        self.report.content["training"] |= {name: metrics[name] for name in scores if name in metrics}


def probe() -> None:
    """Prints what is there as JSON; in a process of its own, since JAX may abort."""
    import jax

    def version(name: str) -> str | None:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)

    def missing(module: str) -> bool:
        try:
            importlib.import_module(module)
        except ImportError:
            return True
        return False

    device = jax.devices()[0]
    facts = {"device": device.device_kind, "platform": device.platform}
    facts |= {"capability": str(getattr(device, "compute_capability", "")), "python": platform.python_version()}
    facts |= {name: version(name) for name in ("jax", "flax", *EXTRAS)}
    facts["missing"] = [package for module, package in PACKAGES.items() if missing(module)]
    print(json.dumps(facts))


def toy_pack(file: Path) -> None:
    """Packed data of four coloured mosaics."""
    from cropformer_vs_torch import pictures
    from PIL import Image

    from data.pack import pack
    from esg_jax.input.readers import SourceConfig
    from esg_jax.masks import rle

    folder = file.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "entity"}]}
    for number, (image, masks) in enumerate(zip(*pictures(4, 64, 96, 5), strict=True)):
        Image.fromarray(image).save(folder / f"{number}.png")
        content["images"].append({"id": number, "file_name": f"{number}.png", "height": 64, "width": 96})
        for code in map(rle.to_json, rle.encode_labels(masks.argmax(0) + 1, len(masks))):
            entry = {"id": len(content["annotations"]), "image_id": number, "category_id": 1, "segmentation": code}
            content["annotations"].append(entry)
    (folder / "annotations.json").write_text(json.dumps(content))
    print(pack(file, [SourceConfig(annotations=str(folder / "annotations.json"))]))


def find_tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def install_commands(run: Run) -> Iterator[list]:
    """Installs what the wheels bring and this Python lacks; pip asks no index."""
    wanted = []
    for name in run.wheels():
        package = re.match(r"[^-]+", name).group().replace("_", "-")
        try:
            importlib.metadata.version(package)  # what is installed stays: other packages may rely on its version
        except importlib.metadata.PackageNotFoundError:
            wanted.append(run.options.wheels / name)
    if wanted and not run.site.exists():
        pip = [PYTHON, "-m", "pip", "install", "--no-index", "--no-deps", "--quiet", "--disable-pip-version-check"]
        partial = run.site.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        yield [*pip, "--target", partial, *(path.absolute() for path in wanted)]
        partial.rename(run.site)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the report (default: runs/gpu)")
    parser.add_argument("--work", type=Path, help="folder of checkpoints and caches (default: OUT/work)")
    parser.add_argument("--minutes", type=float, default=10, help="for everything together")
    parser.add_argument("--train-share", type=float, default=0.4, help="least share of the time that training gets")
    parser.add_argument("--data", type=Path, help="packed training data: a file, or a packed mix")
    parser.add_argument("--validation", type=Path, help="packed data that the trained weights are scored on")
    parser.add_argument("--wheels", type=Path, help="folder of wheels of packages that may be missing")
    parser.add_argument("--stages", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU: does everything run?")
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--toy-pack", type=Path, help=argparse.SUPPRESS)
    options, options.train_options = parser.parse_known_args()
    if wrong := [word for word in options.train_options if not word.startswith("--config.")]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if options.probe:
        return probe()
    if options.toy_pack:
        return toy_pack(options.toy_pack)
    for name in ("data", "validation", "wheels"):
        path = getattr(options, name)
        if path is not None and not path.exists():
            parser.error(f"--{name}: {path} does not exist")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # reported like Ctrl-C

    run = Run(options)
    stages = run.stages()
    unknown = set(options.stages or ()) - {stage.name for stage in stages}
    if unknown:
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; choose from {', '.join(s.name for s in stages)}")
    chosen = [stage for stage in stages if options.stages is None or stage.name in options.stages]
    run.pending = {stage.name for stage in chosen}
    print(f"report: {options.out / 'report.md'}", flush=True)
    any_device = {"JAX_PLATFORMS": "cpu" if options.dry_run else ""}
    try:
        if options.wheels:
            run.run(Stage("wheels", "missing packages from a folder", 2, lambda: install_commands(run)))
        run.run(Stage("machine", "what is there", 2, lambda: [[PYTHON, __file__, "--probe"]], environment=any_device))
        shown = run.report.content["stages"]["machine"]
        if shown["result"] != "passed":
            sys.exit("error: JAX does not start; the end of its output is above and in the report")
        run.report.content["machine"] = json.loads(shown["shown"][-1]) | {"nvcc": find_tool("nvcc")}
        run.report.content["stages"]["machine"]["shown"] = []
        run.report.write()
        if run.machine["platform"] != "gpu" and not run.dry:
            sys.exit(
                f"error: JAX {run.machine['jax']} sees no GPU, only {run.machine['platform']}; install jax[cuda13] or "
                "jax[cuda12], or try --dry-run"
            )
        for stage in chosen:
            run.run(stage)
    except KeyboardInterrupt:
        sys.exit("interrupted; what was done is in the report")
    failed = [name for name, stage in run.report.content["stages"].items() if "passed" not in stage["result"]]
    print(f"\nreport: {options.out / 'report.md'}; not passed: {', '.join(failed) or 'none'}")


if __name__ == "__main__":
    main()
