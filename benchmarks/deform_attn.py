"""Table of deformable-attention implementations x shapes against PyTorch's grid_sample formulation.

    python benchmarks/deform_attn.py                       # CPU or GPU, whatever JAX finds; PyTorch rows when installed
    python benchmarks/deform_attn.py --shapes encoder --rounds 5 --dtype bfloat16
    python benchmarks/deform_attn.py --shapes decoder300 --model 800 1344     # also a full forward pass of CropFormer
    python benchmarks/deform_attn.py --json rows.json       # the rows also as JSON, up to date after every table

Rounds alternate between the contenders, so that a disturbance hits all of them; the table shows medians. Before each
timed call comes an untimed one of the same contender: whoever follows the corner gather would otherwise pay for its
gigabytes (cold caches, pages handed back). Outputs are compared before anything is timed. Estimates for TPUs, from the
compiler alone: deform_attn_tpu.py.

Columns: "compulsory" moves every input and output once; "gathered" counts the rows of all corners, mostly from caches;
FLOP/s count multiplications and additions of channels, not the arithmetic of positions. Percentages are of the
device's limits: data sheets, or on a CPU what a copy and a matrix product reach here. Peak memory is what a call needs
beyond its inputs: by XLA's plan, by PyTorch's CUDA allocator, or for PyTorch on a CPU by resident memory. The rows of
`deformops` (Triton and, if it may compile, CUDA kernels for PyTorch) appear on a GPU where that package is installed.
"""

import argparse
import ctypes
import dataclasses
import functools
import importlib.util
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from jax import numpy as jnp

from esg_jax.ops.deform_attn import available_implementations, deform_attn
from esg_jax.ops.deform_attn.xla import corner_rows

LEVELS = ((25, 42), (50, 84), (100, 167))  # strides 32, 16, 8 of an 800x1333 image
# name: (levels, queries or None for one per pixel)
SHAPES = {
    "encoder": (LEVELS, None),
    "encoder4": (((13, 21), *LEVELS), None),
    "decoder300": (LEVELS, 300),
    "decoder900": (LEVELS, 900),
    "tiny": (((4, 6), (8, 12)), None),
    "small": (((10, 10), (20, 20), (40, 40)), None),
}
# Start of the device's name: (bytes/s of main memory, FLOP/s), from data sheets: float32 without tensor cores on GPUs,
# bfloat16 on TPUs.
LIMITS = {
    "NVIDIA A100-SXM4-40GB": (1.555e12, 19.5e12),
    "NVIDIA A100": (2.039e12, 19.5e12),
    "NVIDIA H100": (3.35e12, 66.9e12),
    "NVIDIA H200": (4.8e12, 66.9e12),
    "TPU v4": (1.2e12, 275e12),
    "TPU v5 lite": (8.2e11, 197e12),
    "TPU v5": (2.765e12, 459e12),
    "TPU v6 lite": (1.64e12, 918e12),
}


@dataclasses.dataclass
class Contender:
    """`call` may return before the result is there; `wait` waits for it."""

    call: Callable
    wait: Callable
    peak_bytes: int | None

    def result(self):
        result = self.call()
        self.wait(result)
        return result

    def seconds(self, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            result = self.call()
        self.wait(result)
        return (time.perf_counter() - start) / calls


def make_inputs(levels, queries, batch, heads, channels, points, sigma, dtype, seed=0):
    """Random values and softmaxed weights; reference points on the pixels, offsets N(0, sigma pixels)."""
    rng = np.random.default_rng(seed)
    grids = [np.stack(np.meshgrid((np.arange(w) + 0.5) / w, (np.arange(h) + 0.5) / h), -1) for h, w in levels]
    centres = np.concatenate([grid.reshape(-1, 2) for grid in grids])
    area = len(centres)
    centres = rng.random((queries, 2)) if queries else centres
    sizes = np.array([(w, h) for h, w in levels])[:, None]
    offsets = rng.standard_normal((batch, len(centres), heads, len(levels), points, 2)) * sigma / sizes
    weights = rng.random((batch, len(centres), heads, len(levels), points), np.float32)
    return (
        jnp.asarray(rng.standard_normal((batch, area, heads, channels), np.float32), dtype),
        jnp.asarray(centres[:, None, None, None] + offsets, jnp.float32),
        jnp.asarray(weights / weights.sum((-1, -2), keepdims=True)),
    )


def corner_gather(values, levels, locations, weights):
    """The obvious JAX form: all corner rows of all queries at once, differentiated automatically."""
    batch, _, heads, channels = values.shape
    rows, coefficients = corner_rows(levels, locations, weights)
    gathered = jax.vmap(lambda v, r: v[r, jnp.arange(heads)[:, None]])(values, rows)
    out = jnp.einsum("bqhkd,bqhk->bqhd", gathered, coefficients, preferred_element_type=jnp.float32)
    return out.reshape(batch, -1, heads * channels).astype(values.dtype)


def jax_contender(function, levels, args, gradient):
    def forward(values, locations, weights):
        return function(values, levels, locations, weights)

    def forward_backward(values, locations, weights):
        out, pull = jax.vjp(forward, values, locations, weights)
        return out, pull(out)

    return compiled_contender(forward_backward if gradient else forward, args)


def compiled_contender(function, args):
    compiled = jax.jit(function).lower(*args).compile()
    memory = compiled.memory_analysis()
    return Contender(
        lambda: compiled(*args), jax.block_until_ready, memory.temp_size_in_bytes + memory.output_size_in_bytes
    )


def torch_device():
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def grid_sample_form(levels, compile_it=False):
    """PyTorch's formulation: one grid_sample per level, then the weighted sum."""
    import torch
    from torch.nn import functional as F

    def forward(values, locations, weights):
        batch, queries, heads, count, points, _ = locations.shape
        channels = values.shape[-1]
        split = values.split([h * w for h, w in levels], dim=1)
        samples = []
        for level, (height, width) in enumerate(levels):
            maps = split[level].flatten(2).transpose(1, 2).reshape(batch * heads, channels, height, width)
            grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1).to(values.dtype)
            samples.append(F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
        attention = weights.transpose(1, 2).reshape(batch * heads, 1, queries, count * points)
        out = (torch.stack(samples, dim=-2).flatten(-2) * attention).sum(-1)
        return out.view(batch, heads * channels, queries).transpose(1, 2).contiguous()

    return torch.compile(forward) if compile_it else forward


def deformops_form(levels, backend):
    """The kernels of the `deformops` package; backend "TRITON" or "CUDA"."""
    import torch
    from deformops.registry import Backend, msda

    shapes = torch.tensor(levels, device=torch_device())
    sizes = [height * width for height, width in levels]
    starts = torch.tensor([sum(sizes[:level]) for level in range(len(sizes))], device=torch_device())

    def forward(values, locations, weights):
        return msda(values, shapes, starts, locations, weights, backend=Backend[backend])

    return forward


def torch_contender(make, args, gradient):
    """A PyTorch function(values, locations, weights); all in the dtype of the values but for the locations."""
    import torch

    device, forward = torch_device(), make()
    dtype = getattr(torch, args[0].dtype.name)
    values, locations, weights = (torch.from_numpy(np.array(a, np.float32)).to(device) for a in args)
    values, weights = values.to(dtype), weights.to(dtype)
    leaves = [a.requires_grad_(gradient) for a in (values, locations, weights)]

    def call():
        with torch.set_grad_enabled(gradient):
            out = forward(*leaves)
            return out, torch.autograd.grad(out, leaves, out.detach()) if gradient else None

    call()  # compiles
    if device == "cpu":
        return Contender(call, lambda result: None, resident_peak(call))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return Contender(call, lambda result: torch.cuda.synchronize(), torch.cuda.max_memory_allocated() - before)


def resident_peak(call):
    """Bytes by which a call raises the resident memory of this process; None where Linux does not tell."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed and the allocator kept would not count again
    reset.write_text("5")  # the high-water mark starts again at what is resident now
    before = int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1])
    call()
    return (int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) - before) * 1024


def implementations():
    """name -> function(values, levels, locations, weights) of all that run here."""
    names = available_implementations()
    return {"corner gather": corner_gather} | {
        name: functools.partial(deform_attn, implementation=name) for name in names
    }


def contenders(options, levels, args, gradient):
    """name -> contender. One that refuses the shape, or fails, is reported and left out: the others still count."""
    makers = {
        name: functools.partial(jax_contender, function, levels, args, gradient)
        for name, function in implementations().items()
    }
    try:
        import torch

        torch.set_num_threads(options.threads or torch.get_num_threads())
        forms = {"torch": functools.partial(grid_sample_form, levels)}
        if options.torch_compile:
            forms["torch.compile"] = functools.partial(grid_sample_form, levels, compile_it=True)
        if torch_device() == "cuda" and importlib.util.find_spec("deformops"):
            forms |= {
                f"deformops {name}": functools.partial(deformops_form, levels, name) for name in ("TRITON", "CUDA")
            }
        makers |= {name: functools.partial(torch_contender, make, args, gradient) for name, make in forms.items()}
    except ImportError:
        print("\ntorch is not installed: no PyTorch rows")
    return build(makers)


def build(makers):
    result = {}
    for name, make in makers.items():
        try:
            result[name] = make()
            result[name].result()
        except Exception as error:
            result.pop(name, None)
            print(f"\n{name}: {type(error).__name__}: {error}")
    return result


def to_numpy(result):
    leaves = jax.tree.leaves(result)
    return [
        np.asarray(leaf.astype(jnp.float32)) if isinstance(leaf, jax.Array) else leaf.detach().float().cpu().numpy()
        for leaf in leaves
    ]


def largest_difference(result, expected):
    """Largest error over the output and gradients, relative to the largest value of each (at least 1)."""
    return max(float(np.abs(a - b).max() / max(1.0, np.abs(b).max())) for a, b in zip(result, expected, strict=True))


def compulsory_bytes(args, gradient):
    """Every input and output moved once between main memory and the device."""
    values, locations, weights = (a.size * a.dtype.itemsize for a in args)
    output = args[1].shape[0] * args[1].shape[1] * args[0].shape[2] * args[0].shape[3] * args[0].dtype.itemsize
    forward = values + locations + weights + output
    return forward if not gradient else 2 * forward + values + locations + weights


def gathered_bytes(args, gradient):
    """Rows of all corners, read once per pass, and as many bytes of updates in the backward pass."""
    values, _, weights = args
    return 4 * weights.size * values.shape[-1] * values.dtype.itemsize * (3 if gradient else 1)


def channel_flops(args, gradient):
    """A multiplication and an addition per corner and channel; two of each in the backward pass."""
    return 2 * 4 * args[2].size * args[0].shape[-1] * (3 if gradient else 1)


@functools.cache
def device_limits():
    """(bytes/s, FLOP/s) or None."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return next((limits for name, limits in LIMITS.items() if device.device_kind.startswith(name)), None)
    array, matrix = jnp.ones(64 << 20, jnp.float32), jnp.ones((2048, 2048))
    copy, product = compiled_contender(lambda a: a + 1, (array,)), compiled_contender(jnp.matmul, (matrix, matrix))
    copied, multiplied = (min(contender.seconds(1) for _ in range(5)) for contender in (copy, product))
    return 2 * array.nbytes / copied, 2 * 2048**3 / multiplied


def median_seconds(calls, rounds):
    """Rounds alternate between the contenders, each warmed up by an untimed call."""
    # Accelerators queue calls, which hides the time of launching them.
    repeats = 1 if jax.default_backend() == "cpu" else 20
    times = {key: [] for key in calls}
    for _ in range(rounds):
        for key, contender in calls.items():
            contender.result()
            times[key].append(contender.seconds(repeats))
    return {key: statistics.median(values) for key, values in times.items()}


def measure(options, name, gradient):
    levels, queries = SHAPES[name]
    dtype = jnp.dtype(options.dtype)
    args = make_inputs(levels, queries, options.batch, options.heads, options.channels, 4, options.sigma, dtype)
    calls = contenders(options, levels, args, gradient)
    # grid_sample takes positions in the dtype of the values: in half precision it is no reference.
    baseline = "torch" if "torch" in calls and dtype == jnp.float32 else "xla"
    expected = to_numpy(calls[baseline].result())
    errors = {key: largest_difference(to_numpy(contender.result()), expected) for key, contender in calls.items()}
    medians = median_seconds(calls, options.rounds)
    work = {
        "compulsory GB/s": compulsory_bytes(args, gradient),
        "gathered GB/s": gathered_bytes(args, gradient),
        "GFLOP/s": channel_flops(args, gradient),
    }
    limits = dict(zip(("compulsory GB/s", "GFLOP/s"), device_limits() or (), strict=False))
    rows = []
    for key, seconds in medians.items():
        row = {"implementation": key, "ms": seconds * 1e3, **ratios(medians, seconds)}
        row |= {column: amount / seconds / 1e9 for column, amount in work.items()}
        row |= {f"{column} of limit": row[column] * 1e9 / limit for column, limit in limits.items()}
        rows.append({**row, "peak MB": megabytes(calls[key].peak_bytes), "max error": errors[key]})
    title = f"{name}, batch {options.batch}, {args[1].shape[1]} queries, {options.heads} heads x {options.channels}, "
    title += f"{dtype.name}, {'forward + backward' if gradient else 'forward'}"
    report(options, title, rows)


def report(options, title, rows):
    """Prints a table and adds it to the JSON file."""
    device = jax.devices()[0].device_kind
    print(f"\n{title}, {device}\n")
    columns = [column for column in rows[0] if not column.endswith(" of limit")]
    print_row(columns)
    print_row(["---"] * len(columns))
    for row in rows:
        limits = {column: row.get(f"{column} of limit") for column in columns}
        print_row([shown(row[column]) + (f" ({limits[column]:.1%})" if limits[column] else "") for column in columns])
    if options.json:
        file = Path(options.json)
        tables = json.loads(file.read_text()) if file.exists() else []
        file.write_text(json.dumps([*tables, {"title": title, "device": device, "rows": rows}], indent=1))


def shown(value):
    """A number to three or four digits."""
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    return f"{value:.1e}" if 0 < value < 1e-3 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def ratios(medians, seconds):
    """How many times faster than each baseline."""
    return {
        f"x {name}": medians[name] / seconds for name in ("corner gather", "torch", "torch.compile") if name in medians
    }


def megabytes(count):
    return None if count is None else count / 1e6


def print_row(cells):
    print("| " + " | ".join(cells) + " |", flush=True)


def measure_model(options):
    """Forward pass of CropFormer Swin-T, random weights, on an image and four crops, with every implementation."""
    from flax import nnx

    from esg_jax.models.cropformer import CropFormer, CropFormerConfig

    height, width = options.model
    dtype = jnp.dtype(options.dtype)
    model = CropFormer(CropFormerConfig.swin_tiny(), rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)
    graph, state = nnx.split(model)
    views = jax.random.randint(jax.random.key(0), (1, 5, height, width, 3), 0, 256).astype(jnp.uint8)
    args = state, views, jnp.full((1, 5, 2), jnp.array([height, width]))

    def make(function):
        def forward(state, views, sizes):
            output = nnx.merge(graph, state)(views, sizes, all_predictions=False)
            return output.batch.logits, output.batch_mask_logits()

        with mock.patch("esg_jax.models.cropformer.pixel_decoder.deform_attn", function):
            return compiled_contender(forward, args)

    calls = build({name: functools.partial(make, function) for name, function in implementations().items()})
    expected = to_numpy(calls["xla"].result())
    medians, rows = median_seconds(calls, options.rounds), []
    for key, seconds in medians.items():
        error = largest_difference(to_numpy(calls[key].result()), expected)
        row = {"implementation": key, "ms": seconds * 1e3, **ratios(medians, seconds)}
        rows.append({**row, "peak MB": megabytes(calls[key].peak_bytes), "max error": error})
    report(options, f"CropFormer Swin-T, 5 views of {height}x{width}, {dtype.name}, forward", rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["encoder", "decoder300"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--sigma", type=float, default=4.0, help="standard deviation of the offsets in pixels")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, help="PyTorch CPU threads")
    parser.add_argument("--torch-compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", help="file that also gets the rows")
    parser.add_argument("--model", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="CropFormer on such an image")
    options = parser.parse_args()
    if options.json:
        Path(options.json).unlink(missing_ok=True)
    for name in options.shapes:
        for gradient in (False, True):
            measure(options, name, gradient)
    if options.model:
        measure_model(options)


if __name__ == "__main__":
    main()
