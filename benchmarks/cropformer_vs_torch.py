"""Mask2Former Swin-T, ours against PyTorch (transformers), with the same weights and the same image.

    python benchmarks/cropformer_vs_torch.py --height 512 --width 512 --rounds 5

Three tasks: `forward` (inference), `backward` (gradient of the mean square of the final class and mask logits) and
`train` (forward, matching and losses of all ten predictions at 12,544 points, gradient). Rounds alternate between the
two frameworks in one process, so that both see the same load of the machine; the best round of each counts. CPU seconds
are those of all threads. Peak memory comes from a process per framework and task: high-water mark of resident memory
above the mark before the first call, compilation included unless its result is cached.
"""

import argparse
import json
import multiprocessing
import re
import tempfile
import time
from pathlib import Path

import numpy as np

TASKS = ("forward", "backward", "train")
FRAMEWORKS = ("torch", "jax")


def picture(height: int, width: int, entities: int) -> tuple[np.ndarray, np.ndarray]:
    """A flat-coloured mosaic with noise, uint8 (H, W, 3), and its entities, bool (N, H, W)."""
    rng = np.random.default_rng(0)
    seeds = rng.uniform(size=(entities, 2)) * (height, width)
    grid = np.stack(np.mgrid[:height, :width], -1)
    nearest = np.argmin(((grid[:, :, None] - seeds) ** 2).sum(-1), axis=-1)
    colours = rng.integers(30, 226, (entities, 3))
    image = colours[nearest] + rng.integers(-30, 31, (height, width, 3))
    return image.astype(np.uint8), np.arange(entities)[:, None, None] == nearest


def torch_model():
    import torch
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    from esg_jax.interop.families.mask2former import mask2former_config
    from esg_jax.models.cropformer import CropFormerConfig

    torch.manual_seed(0)
    values = mask2former_config(CropFormerConfig.swin_tiny().without_views())
    values["backbone_config"]["drop_path_rate"] = 0.0
    return Mask2FormerForUniversalSegmentation(Mask2FormerConfig.from_dict(values)).eval()


def torch_task(model, task: str, image: np.ndarray, masks: np.ndarray):
    """A function without arguments: it computes the task and returns class and mask logits as numpy."""
    import torch

    mean, std = (np.array(x, np.float32) for x in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
    pixels = torch.from_numpy(((image - mean) / std).transpose(2, 0, 1)[None])
    targets = {}
    if task == "train":
        targets = {
            "mask_labels": [torch.from_numpy(masks.astype(np.float32))],
            "class_labels": [torch.zeros(len(masks), dtype=torch.int64)],
        }

    def run():
        with torch.set_grad_enabled(task != "forward"):
            output = model(pixel_values=pixels, output_auxiliary_logits=task == "train", **targets)
            if task != "forward":
                model.zero_grad(set_to_none=True)
                logits = (output.class_queries_logits, output.masks_queries_logits)
                loss = output.loss if task == "train" else sum(x.square().mean() for x in logits)
                loss.backward()
        return output.class_queries_logits.detach().numpy(), output.masks_queries_logits.detach().numpy()

    return run


def jax_model(model):
    from esg_jax.interop.checkpoints import load_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_checkpoint(folder)[0]


def jax_task(model, task: str, image: np.ndarray, masks: np.ndarray):
    """As `torch_task`."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from esg_jax.losses.cropformer import LossConfig, cropformer_loss

    graph, params, rest = nnx.split(model, nnx.Param, ...)
    views, size = jnp.asarray(image)[None, None], jnp.asarray([[image.shape[:2]]], jnp.int32)
    count = len(masks)
    batch = {
        "masks": jnp.asarray(np.packbits(masks[None, :, None], axis=-1)),
        "labels": jnp.zeros((1, count), jnp.int32),
        "present": jnp.ones((1, count), bool),
        "valid": jnp.ones((1, count, 1), bool),
    }
    keys = jax.random.split(jax.random.key(0), 1)

    def loss(params):
        output = nnx.merge(graph, params, rest)(views, size, all_predictions=task == "train")
        logits = output.image.logits[-1], output.image_mask_logits()[:, 0]
        if task == "train":
            return cropformer_loss(output, batch, keys, LossConfig())[0], logits
        return sum(jnp.mean(jnp.square(x)) for x in logits), logits

    gradient = jax.value_and_grad(loss, has_aux=True)
    function = jax.jit(lambda params: loss(params)[1] if task == "forward" else gradient(params))

    def run():
        result = jax.block_until_ready(function(params))
        return tuple(np.asarray(x) for x in (result if task == "forward" else result[0][1]))

    return run


def build(framework: str, task: str, args):
    reference = torch_model()
    inputs = picture(args.height, args.width, args.entities)
    if framework == "torch":
        return torch_task(reference, task, *inputs)
    return jax_task(jax_model(reference), task, *inputs)


def peak_memory(queue, framework: str, task: str, args) -> None:
    """In a process of its own: MiB by which the first two calls raise the high-water mark of resident memory."""
    run = build(framework, task, args)
    before = high_water()
    run()
    run()
    queue.put(high_water() - before)


def high_water() -> float:
    """MiB of resident memory that this process has had at most; getrusage would also count its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status).group(1)) / 1024


def measure(task: str, args) -> dict:
    reference = torch_model()
    inputs = picture(args.height, args.width, args.entities)
    runs = {"torch": torch_task(reference, task, *inputs), "jax": jax_task(jax_model(reference), task, *inputs)}
    results = {name: run() for name, run in runs.items()}  # warms up, and compiles
    row = {"task": task}
    for name, index in (("classes", 0), ("masks", 1)):
        row[f"difference of {name}"] = float(np.abs(results["torch"][index] - results["jax"][index]).max())
    for name in runs:
        row[f"{name} wall"] = row[f"{name} cpu"] = float("inf")
    for _ in range(args.rounds):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            row[f"{name} wall"] = min(row[f"{name} wall"], time.perf_counter() - wall)
            row[f"{name} cpu"] = min(row[f"{name} cpu"], time.process_time() - cpu)
    context = multiprocessing.get_context("spawn")
    for name in runs if args.memory else ():
        queue = context.Queue()
        process = context.Process(target=peak_memory, args=(queue, name, task, args))
        process.start()
        row[f"{name} MiB"] = queue.get()
        process.join()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=512, help="of the image, a multiple of 32")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--entities", type=int, default=20, help="targets of the train task")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="skip the memory measurement")
    args = parser.parse_args()

    import jax
    import torch
    import transformers

    print(
        f"jax {jax.__version__} on {jax.devices()[0].device_kind}, torch {torch.__version__} with "
        f"{torch.get_num_threads()} threads, transformers {transformers.__version__}, "
        f"{args.height}x{args.width}"
    )
    header = ["task", "torch s", "jax s", "speed-up", "torch CPU s", "jax CPU s"]
    header += ["torch MiB", "jax MiB", "difference of classes", "difference of masks"]
    print("| " + " | ".join(header) + " |\n|" + " --- |" * len(header))
    for task in args.tasks:
        row = measure(task, args)
        cells = [task, f"{row['torch wall']:.2f}", f"{row['jax wall']:.2f}"]
        cells += [f"{row['torch wall'] / row['jax wall']:.2f}", f"{row['torch cpu']:.2f}", f"{row['jax cpu']:.2f}"]
        cells += [f"{row[f'{name} MiB']:.0f}" if args.memory else "" for name in FRAMEWORKS]
        cells += [f"{row['difference of classes']:.1e}", f"{row['difference of masks']:.1e}"]
        print("| " + " | ".join(cells) + " |", flush=True)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
