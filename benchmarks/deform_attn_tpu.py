"""Deformable attention on TPU, from the compiler alone: no TPU is needed, and nothing here is a measured time.

    python benchmarks/deform_attn_tpu.py v5e v6e            # pip install "esg_jax[tpu]" for libtpu
    python benchmarks/deform_attn_tpu.py v4 v5p --shapes decoder300 decoder900 --forms pallas_tpu

For XLA forms: bytes accessed / memory bandwidth, a lower bound (gather latency and serialised scatters not included).
For the Pallas kernels: the compiler's final schedule, one bundle per cycle, loop bodies times the number of row chunks
that random offsets visit, without stalls; plus the bytes of the surrounding layout preparation / bandwidth. A v4 or v5p
is one device of two cores, and each takes half of the heads.
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# name, and options of `get_topology_desc`; two cores of a v4 are one device unless one asks otherwise.
TOPOLOGIES = {
    "v4": ("v4:2x2x1", dict(chip_config_name="megacore")),
    "v5e": ("v5e:2x2", {}),
    "v5p": ("v5p:2x2x1", {}),
    "v6e": ("v6e:2x2", {}),
}
# Hz (the compiler's clock model is not public: assumed), bytes/s
CLOCK = {"v4": 1.05e9, "v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}
BANDWIDTH = {"v4": 1.2e12, "v5e": 8.2e11, "v5p": 2.765e12, "v6e": 1.64e12}
FORMS = ("pallas_tpu", "xla packed", "corner gather")


def compile_form(generation, shape, form, gradient, sigma):
    """Runs in a process of its own, since dump flags are read once; prints `name value` pairs."""
    import jax
    import numpy as np
    from deform_attn import SHAPES, corner_gather, make_inputs
    from jax import numpy as jnp
    from jax.experimental import topologies

    from esg_jax.ops.deform_attn import pallas_tpu, xla

    levels, queries = SHAPES[shape]
    args = make_inputs(levels, queries, 1, 8, 32, 4, sigma, jnp.bfloat16)
    functions = {
        "pallas_tpu": (lambda v, *a: pallas_tpu.forward(v, levels, *a), pallas_tpu.backward),
        "xla packed": (lambda v, *a: xla.packed_forward(v, levels, *a), xla.packed_backward),
        "corner gather": (lambda v, *a: corner_gather(v, levels, *a), None),
    }
    forward, backward = functions[form]

    def forward_backward(values, locations, weights, grad):
        if backward is None:
            out, pull = jax.vjp(forward, values, locations, weights)
            return out, pull(grad)
        return forward(values, locations, weights), backward(values, levels, locations, weights, grad)

    topology, topology_options = TOPOLOGIES[generation]
    devices = topologies.get_topology_desc(topology, "tpu", **topology_options).devices
    mesh = jax.sharding.Mesh(np.array(devices[:1]), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    abstract = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in args]
    grad = jax.ShapeDtypeStruct((1, args[1].shape[1], 256), jnp.bfloat16, sharding=sharding)
    with jax.set_mesh(mesh):
        lowered = jax.jit(forward_backward).lower(*abstract, grad) if gradient else jax.jit(forward).lower(*abstract)
        compiled = lowered.compile()
    print("peak", compiled.memory_analysis().peak_memory_in_bytes)
    print("bytes", compiled.cost_analysis()["bytes accessed"])
    for level, (height, width) in enumerate(levels):
        x, y, _ = pallas_tpu._lanes(args[1], args[2], level, height, width)
        first, last = pallas_tpu._chunk_range(x, y, height, width)
        per_core = jnp.maximum(last - first, 0).reshape(devices[0].num_cores, -1)
        print("chunks", per_core.sum(1).max(), "steps", per_core.shape[1])


def kernel_bundles(folder):
    """[(bundles per grid step outside the chunk loop, bundles of the chunk loop)] of all Pallas kernels dumped."""
    kernels = []
    for analysis in sorted(Path(folder).glob("*-02-schedule-analysis_final_bundles.txt")):
        if "custom-call" not in analysis.read_text():
            continue
        depth = [0, 0, 0]
        bundles = analysis.with_name(analysis.name.replace("-02-schedule-analysis_final_", "-03-final_"))
        for line in bundles.read_text().splitlines():
            match = re.match(r"\s*(?:0x[0-9a-f]+|0)\s+(?:\w\w)?\s*: (>*) ?\{", line)
            if match:
                depth[min(len(match[1]), 2)] += 1
        if depth[2]:  # the program as a whole calls kernels, but has no loop of its own
            kernels.append((depth[1], depth[2]))
    return kernels


def estimate(generation, shape, form, gradient, sigma, verbose):
    kind = "fwd+bwd" if gradient else "fwd"
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*final.*"
        environment = dict(os.environ, JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
        # A compilation found in the cache would dump nothing.
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        if form == "pallas_tpu":
            environment["LIBTPU_INIT_ARGS"] = flags
        command = [sys.executable, __file__, "--child", generation, shape, form, str(int(gradient)), str(sigma)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if result.returncode:
            print(result.stderr[-2000:], file=sys.stderr)
            return f"| {generation} | {shape} | {form} | {kind} | does not compile | | |"
        words = [line.split() for line in result.stdout.splitlines()]
        facts = {line[0]: float(line[1]) for line in words if line[0] in ("peak", "bytes")}
        chunks = [(int(line[1]), int(line[3])) for line in words if line[0] == "chunks"]
        memory_time = facts["bytes"] / BANDWIDTH[generation]
        schedule = 0.0
        if form == "pallas_tpu":
            kernels = kernel_bundles(folder)
            assert len(kernels) == len(chunks) * (2 if gradient else 1), "a kernel's schedule was not found in the dump"
            # Dumps name no level: forward loops are shorter than backward ones, and longer on later (wider) levels.
            kernels.sort(key=lambda kernel: kernel[1])
            per_kernel = chunks * (2 if gradient else 1)
            if verbose:
                print(
                    "bundles per grid step, per chunk; chunks, steps of a core:", *zip(kernels, per_kernel, strict=True)
                )
            schedule = (
                sum(
                    steps * fixed + count * body
                    for (fixed, body), (count, steps) in zip(kernels, per_kernel, strict=True)
                )
                / CLOCK[generation]
            )
    total = f"{(schedule + memory_time) * 1e3:.1f} = {schedule * 1e3:.1f} schedule + {memory_time * 1e3:.1f} memory"
    gigabytes = f"{facts['bytes'] / 1e9:.2f}"
    return f"| {generation} | {shape} | {form} | {kind} | {total} | {facts['peak'] / 1e6:.0f} | {gigabytes} |"


def main():
    if sys.argv[1:2] == ["--child"]:
        generation, shape, form, gradient, sigma = sys.argv[2:]
        compile_form(generation, shape, form, gradient == "1", float(sigma))
        return
    from deform_attn import SHAPES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("generations", nargs="+", choices=TOPOLOGIES)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["encoder"])
    parser.add_argument("--sigma", type=float, default=4.0, help="standard deviation of the offsets in pixels")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--verbose", action="store_true", help="also print bundles and chunks of every kernel")
    options = parser.parse_args()
    print("COMPILE-TIME ESTIMATES, nothing ran on a TPU. One image, bfloat16 values.")
    print("| TPU | shape | form | pass | ms, estimated | peak MB | GB moved |\n|---|---|---|---|---|---|---|")
    for generation, shape, form, gradient in itertools.product(
        options.generations, options.shapes, options.forms, (False, True)
    ):
        print(estimate(generation, shape, form, gradient, options.sigma, options.verbose), flush=True)


if __name__ == "__main__":
    main()
