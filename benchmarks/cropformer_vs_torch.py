"""Mask2Former Swin-T, ours against PyTorch (transformers), with the same weights and the same images.

    python benchmarks/cropformer_vs_torch.py --height 512 --width 512 --rounds 5
    python benchmarks/cropformer_vs_torch.py --tasks views --height 800 --width 1344 --dtype bfloat16     # on a GPU

Four tasks: `forward` (inference), `backward` (gradient of the mean square of the final class and mask logits), `train`
(forward, matching and losses of all ten predictions at 12,544 points, gradient; no optimiser) and `views` (our
CropFormer with its association on an image and four crops, against Mask2Former on the five pictures as a batch, which
is less work). Runs where JAX runs, GPU or CPU; without transformers only our rows appear.

Rounds alternate between the contenders in one process, so that all see the same load of the machine; the best round of
each counts. TFLOP/s count the matrix products and convolutions of our program for every contender, MFU is their share
of the bfloat16 peak. On a GPU, peak memory is what a call needs beyond weights and inputs: by XLA's plan and by
PyTorch's allocator, and CPU seconds are not shown. On a CPU it comes from a process per framework and task: high-water
mark of resident memory above the mark before the first call, compilation included unless its result is cached.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import multiprocessing
import re
import tempfile
import time
from pathlib import Path

import numpy as np

TASKS = ("forward", "backward", "train", "views")


def pictures(count: int, height: int, width: int, entities: int) -> tuple[np.ndarray, np.ndarray]:
    """Flat-coloured mosaics with noise, uint8 (B, H, W, 3), and their entities, bool (B, N, H, W)."""
    rng = np.random.default_rng(0)
    images, masks = [], []
    for _ in range(count):
        seeds = rng.uniform(size=(entities, 2)) * (height, width)
        grid = np.stack(np.mgrid[:height, :width], -1)
        nearest = np.argmin(((grid[:, :, None] - seeds) ** 2).sum(-1), axis=-1)
        colours = rng.integers(30, 226, (entities, 3))
        images.append((colours[nearest] + rng.integers(-30, 31, (height, width, 3))).astype(np.uint8))
        masks.append(np.arange(entities)[:, None, None] == nearest)
    return np.stack(images), np.stack(masks)


def model_config(size: str):
    """Swin-T, or something of a quarter of its depth that compiles quickly and says nothing about speed."""
    from esg_jax.models.backbones.swin import SwinConfig
    from esg_jax.models.cropformer import CropFormerConfig

    config = CropFormerConfig.swin_tiny()
    if size == "swin_t":
        return config
    return dataclasses.replace(
        config,
        backbone=SwinConfig(embed_dim=32, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), window_size=7),
        pixel_decoder=dataclasses.replace(config.pixel_decoder, num_layers=1),
        mask_decoder=dataclasses.replace(config.mask_decoder, num_layers=1, num_queries=8),
    )


def torch_model(size: str):
    import torch
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    from esg_jax.interop.families.mask2former import mask2former_config

    torch.manual_seed(0)
    values = mask2former_config(model_config(size).without_views())
    values["backbone_config"]["drop_path_rate"] = 0.0
    return Mask2FormerForUniversalSegmentation(Mask2FormerConfig.from_dict(values)).eval()


class TorchTask:
    """Calling it starts the computation and gives class and mask logits."""

    def __init__(self, model, task: str, images: np.ndarray, masks: np.ndarray, dtype: str, compile_it: bool = False):
        import torch

        self._torch, self._task = torch, task
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._parameters = model.to(self.device)
        self._model = torch.compile(model) if compile_it else model
        self._autocast = torch.autocast(self.device, torch.bfloat16) if dtype == "bfloat16" else None
        mean, std = (np.array(x, np.float32) for x in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
        self._pixels = torch.from_numpy(((images - mean) / std).transpose(0, 3, 1, 2)).to(self.device)
        self._targets = {}
        if task == "train":
            labels = torch.zeros(masks.shape[1], dtype=torch.int64, device=self.device)
            self._targets = {
                "mask_labels": [torch.from_numpy(mask.astype(np.float32)).to(self.device) for mask in masks],
                "class_labels": [labels for _ in masks],
            }

    def __call__(self):
        gradient, train = self._task in ("backward", "train"), self._task == "train"
        with self._torch.set_grad_enabled(gradient):
            with self._autocast or contextlib.nullcontext():
                output = self._model(pixel_values=self._pixels, output_auxiliary_logits=train, **self._targets)
                logits = output.class_queries_logits, output.masks_queries_logits
                loss = output.loss if train else sum(x.float().square().mean() for x in logits) if gradient else None
            if gradient:
                self._parameters.zero_grad(set_to_none=True)
                loss.backward()
        return logits

    def wait(self, result) -> None:
        if self.device == "cuda":
            self._torch.cuda.synchronize()

    def numpy(self, result) -> list[np.ndarray]:
        return [x.detach().float().cpu().numpy() for x in result]

    def peak_bytes(self) -> int:
        """Of a call on a GPU, beyond weights and inputs."""
        self._parameters.zero_grad(set_to_none=True)
        self.wait(None)
        self._torch.cuda.reset_peak_memory_stats()
        before = self._torch.cuda.memory_allocated()
        self.wait(self())
        return self._torch.cuda.max_memory_allocated() - before


class JaxTask:
    """As `TorchTask`; `model` is a PyTorch model whose weights are taken, or None for random ones."""

    def __init__(self, model, config, task: str, images: np.ndarray, masks: np.ndarray, dtype: str):
        import jax
        import jax.numpy as jnp
        from flax import nnx

        from esg_jax.losses.cropformer import LossConfig, cropformer_loss
        from esg_jax.models.cropformer import CropFormer
        from esg_jax.train.flops import count_flops

        if task == "views" or model is None:
            config = config if task == "views" else config.without_views()
            model = CropFormer(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype))
        else:
            model = _ours(model, jnp.dtype(dtype))
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        views = jnp.asarray(images[None] if task == "views" else images[:, None])
        size = jnp.broadcast_to(jnp.asarray(images.shape[1:3], jnp.int32), (*views.shape[:2], 2))
        batch = {
            "masks": jnp.asarray(np.packbits(masks[:, :, None], axis=-1)),
            "labels": jnp.zeros(masks.shape[:2], jnp.int32),
            "present": jnp.ones(masks.shape[:2], bool),
            "valid": jnp.ones((*masks.shape[:2], 1), bool),
        }
        keys = jax.random.split(jax.random.key(0), len(masks))

        def loss(params, views):
            output = nnx.merge(graph, params, rest)(views, size, all_predictions=task == "train")
            if task == "views":
                return None, (output.batch.logits[-1], output.batch_mask_logits())
            logits = output.image.logits[-1], output.image_mask_logits()[:, 0]
            if task == "train":
                return cropformer_loss(output, batch, keys, LossConfig())[0], logits
            return sum(jnp.mean(jnp.square(x)) for x in logits), logits

        def run(params, views):
            if task in ("forward", "views"):
                return loss(params, views)[1], None
            (_, logits), gradient = jax.value_and_grad(loss, has_aux=True)(params, views)
            return logits, gradient

        traced = jax.jit(run).trace(params, views)
        self.flops = count_flops(traced.jaxpr)
        self._call, self._arguments = traced.lower().compile(), (params, views)
        self.wait = jax.block_until_ready

    def __call__(self):
        return self._call(*self._arguments)

    def numpy(self, result) -> list[np.ndarray]:
        return [np.asarray(x, np.float32) for x in result[0]]

    def peak_bytes(self) -> int:
        memory = self._call.memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes


def _ours(model, dtype):
    from esg_jax.interop.checkpoints import load_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_checkpoint(folder, dtype=dtype)[0]


def contenders(args) -> list[str]:
    peers = ["torch", "torch.compile"] if args.torch_compile else ["torch"]
    return [*(peers if importlib.util.find_spec("transformers") else ()), "jax"]


def build(name: str, task: str, args):
    reference = torch_model(args.size) if importlib.util.find_spec("transformers") else None
    inputs = pictures(5 if task == "views" else args.batch, args.height, args.width, args.entities)
    if name == "jax":
        return JaxTask(reference, model_config(args.size), task, *inputs, args.dtype)
    return TorchTask(reference, task, *inputs, args.dtype, compile_it=name == "torch.compile")


def resident_peak(queue, name: str, task: str, args) -> None:
    """In a process of its own: bytes by which the first two calls raise the high-water mark of resident memory."""
    run = build(name, task, args)
    before = high_water()
    run.numpy(run())
    run.numpy(run())
    queue.put(high_water() - before)


def high_water() -> int:
    """Bytes of resident memory that this process has had at most; getrusage would also count its parent's."""
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()).group(1))


def measure(task: str, args) -> list[dict]:
    """A row per contender; one that fails has a row with the reason."""
    import jax

    from esg_jax.train.flops import peak_flops

    device, runs, results, failures = jax.devices()[0], {}, {}, []
    for name in contenders(args):
        try:
            runs[name] = build(name, task, args)
            results[name] = runs[name].numpy(runs[name]())  # warms up, and compiles
        except Exception as error:
            runs.pop(name, None)
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200].replace("|", "/")
            failures.append({"task": task, "implementation": name, "ms": reason})
    walls, cpus = ({name: float("inf") for name in runs} for _ in range(2))
    for _ in range(args.rounds):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run.wait(run())
            walls[name] = min(walls[name], time.perf_counter() - wall)
            cpus[name] = min(cpus[name], time.process_time() - cpu)
    rows = []
    for name, run in runs.items():
        row = {"task": task, "implementation": name, "ms": 1e3 * walls[name]}
        for peer in ("torch", "torch.compile"):
            row[f"x {peer}"] = walls[peer] / walls[name] if peer in walls else None
        on_cpu = device.platform == "cpu"
        row["CPU s"] = cpus[name] if on_cpu else None
        row["peak MB"] = _peak(name, run, task, args, on_cpu) / 1e6 if args.memory else None
        flops = runs["jax"].flops / walls[name] if "jax" in runs else None
        row["TFLOP/s"] = flops and flops / 1e12
        row["MFU"] = flops / peak_flops(device) if flops and peak_flops(device) else None
        compared = "torch" in results and task != "views"  # there the models differ
        for index, what in enumerate(("classes", "masks")):
            difference = np.abs(results["torch"][index] - results[name][index]).max() if compared else None
            row[f"difference of {what}"] = None if difference is None else float(difference)
        rows.append(row)
    return rows + failures


def _peak(name: str, run, task: str, args, on_cpu: bool) -> int:
    if not on_cpu:
        return run.peak_bytes()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=resident_peak, args=(queue, name, task, args))
    process.start()
    peak = queue.get()
    process.join()
    return peak


def shown(column: str, value) -> str:
    if value is None:
        return ""
    if column == "MFU":
        return f"{value:.1%}"
    if isinstance(value, float):
        return f"{value:.1e}" if column.startswith("difference") else f"{value:.2f}" if value < 100 else f"{value:.0f}"
    return str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=512, help="of the images, a multiple of 32")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--size", choices=["swin_t", "tiny"], default="swin_t", help="tiny: only to see that it runs")
    parser.add_argument("--batch", type=int, default=1, help="images, but for the task views")
    parser.add_argument("--entities", type=int, default=20, help="targets of the train task, per image")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS[:3])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="weights stay float32")
    parser.add_argument("--torch-compile", action="store_true", help="a row of torch.compile, too")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="skip the memory measurement")
    parser.add_argument("--json", type=Path, help="file that also gets the rows")
    args = parser.parse_args()

    import jax

    versions = [f"jax {jax.__version__}"]
    if "torch" in contenders(args):
        import torch
        import transformers

        versions += [f"torch {torch.__version__} with {torch.get_num_threads()} threads"]
        versions += [f"transformers {transformers.__version__}"]
    else:
        versions += ["transformers is not installed: no PyTorch rows"]
    kind = jax.devices()[0].device_kind
    print(f"{', '.join(versions)}; {args.batch} x {args.height}x{args.width}, {args.dtype}, {kind}\n")
    rows, columns = [], []
    for task in args.tasks:
        for row in measure(task, args):
            if not columns:
                columns = list(row)
                print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
            print("| " + " | ".join(shown(column, row.get(column)) for column in columns) + " |", flush=True)
            rows.append(row)
            if args.json:
                args.json.write_text(json.dumps({"device": kind, "dtype": args.dtype, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
