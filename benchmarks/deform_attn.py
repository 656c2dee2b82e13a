"""Table of deformable-attention implementations x shapes against PyTorch's grid_sample formulation.

    python benchmarks/deform_attn.py                       # CPU or GPU, whatever JAX finds; PyTorch rows when installed
    python benchmarks/deform_attn.py --shapes encoder --rounds 5 --dtype bfloat16

Rounds alternate between the contenders, so that a disturbance hits all of them; the table shows medians. Before each
timed call comes an untimed one of the same contender: whoever follows the corner gather would otherwise pay for its
gigabytes (cold caches, pages handed back). Outputs are compared before anything is timed. Estimates for TPUs, from the
compiler alone: deform_attn_tpu.py.
"""

import argparse
import functools
import statistics
import time

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
    "small": (((10, 10), (20, 20), (40, 40)), None),
}
# Bytes/s of main memory, from the vendors' data sheets.
BANDWIDTH = {"A100-SXM4-40GB": 1.555e12, "A100": 2.039e12, "H100": 3.35e12, "H200": 4.8e12, "v4": 1.2e12}
BANDWIDTH |= {"v5e": 8.2e11, "v5p": 2.765e12, "v6e": 1.64e12}


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
    """(call, temporary bytes) of a compiled JAX function."""

    def forward(values, locations, weights):
        return function(values, levels, locations, weights)

    def forward_backward(values, locations, weights):
        out, pull = jax.vjp(forward, values, locations, weights)
        return out, pull(out)

    compiled = jax.jit(forward_backward if gradient else forward).lower(*args).compile()
    memory = compiled.memory_analysis()
    return lambda: jax.block_until_ready(compiled(*args)), memory.temp_size_in_bytes


def torch_contender(levels, args, gradient, compile_it):
    """PyTorch's formulation: one grid_sample per level, then the weighted sum."""
    import torch
    from torch.nn import functional as F

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    dtype = getattr(torch, args[0].dtype.name)
    values, locations, weights = (torch.from_numpy(np.array(a, np.float32)).to(device) for a in args)
    values, weights = values.to(dtype), weights.to(dtype)

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

    if compile_it:
        forward = torch.compile(forward)
    leaves = [a.requires_grad_(gradient) for a in (values, locations, weights)]

    def call():
        with torch.set_grad_enabled(gradient):
            out = forward(*leaves)
            result = out, torch.autograd.grad(out, leaves, out.detach()) if gradient else None
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    if device == "cpu":
        return call, None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return call, torch.cuda.max_memory_allocated() - before


def contenders(options, levels, args, gradient):
    """name -> (call, temporary bytes or None); an implementation that refuses the shape is reported and left out."""
    functions = {"corner gather": corner_gather}
    for name in available_implementations():
        functions[name] = functools.partial(deform_attn, implementation=name)
    result = {}
    for name, function in functions.items():
        try:
            result[name] = jax_contender(function, levels, args, gradient)
        except ValueError as error:
            print(f"{name}: {error}")
    try:
        import torch
    except ImportError:
        print("torch is not installed: no PyTorch rows")
        return result
    torch.set_num_threads(options.threads or torch.get_num_threads())
    for name, compile_it in (("torch", False), ("torch.compile", True)):
        if compile_it and not options.torch_compile:
            continue
        result[name] = torch_contender(levels, args, gradient, compile_it)
    return result


def to_numpy(result):
    leaves = jax.tree.leaves(result)
    return [
        np.asarray(leaf.astype(jnp.float32)) if isinstance(leaf, jax.Array) else leaf.detach().float().cpu().numpy()
        for leaf in leaves
    ]


def largest_difference(result, expected):
    """Largest error over the output and gradients, relative to the largest value of each (at least 1)."""
    pairs = zip(to_numpy(result), to_numpy(expected), strict=True)
    return max(np.abs(a - b).max() / max(1.0, np.abs(b).max()) for a, b in pairs)


def compulsory_bytes(args, gradient):
    """Every input and output moved once between main memory and the device."""
    values, locations, weights = (a.size * a.dtype.itemsize for a in args)
    output = args[1].shape[0] * args[1].shape[1] * args[0].shape[2] * args[0].shape[3] * args[0].dtype.itemsize
    forward = values + locations + weights + output
    return forward if not gradient else 2 * forward + values + locations + weights


def measure(options, name, gradient):
    levels, queries = SHAPES[name]
    dtype = jnp.dtype(options.dtype)
    args = make_inputs(levels, queries, options.batch, options.heads, options.channels, 4, options.sigma, dtype)
    calls = contenders(options, levels, args, gradient)
    baseline = "torch" if "torch" in calls else "corner gather"
    expected = calls[baseline][0]()
    errors = {key: largest_difference(call(), expected) for key, (call, _) in calls.items()}
    times = {key: [] for key in calls}
    for _ in range(options.rounds):
        for key, (call, _) in calls.items():
            call()
            start = time.perf_counter()
            call()
            times[key].append(time.perf_counter() - start)
    medians = {key: statistics.median(values) for key, values in times.items()}
    device = jax.devices()[0].device_kind
    limit = next((value for key, value in BANDWIDTH.items() if key in device), None)
    moved = compulsory_bytes(args, gradient)
    print(
        f"\n{name}, batch {options.batch}, {args[1].shape[1]} queries, {options.heads} heads x {options.channels}, "
        f"{dtype.name}, {'forward + backward' if gradient else 'forward'}, {device}"
    )
    print(
        "| implementation | ms | x corner gather | x torch | compulsory GB/s | of device | temporary MB | max error |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for key, seconds in medians.items():
        share = f"{moved / seconds / limit:.1%}" if limit else "-"
        versus = f"{medians['torch'] / seconds:.2f}" if "torch" in medians else "-"
        temporary = "-" if calls[key][1] is None else f"{calls[key][1] / 1e6:.0f}"
        print(
            f"| {key} | {seconds * 1e3:.2f} | {medians['corner gather'] / seconds:.2f} | {versus} "
            f"| {moved / seconds / 1e9:.1f} | {share} | {temporary} | {errors[key]:.1e} |",
            flush=True,
        )


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
    parser.add_argument("--torch-compile", action="store_true")
    options = parser.parse_args()
    for name in options.shapes:
        for gradient in (False, True):
            measure(options, name, gradient)


if __name__ == "__main__":
    main()
