"""Compiles the Pallas GPU kernel of deformable attention for an NVIDIA GPU without having one.

    pip install "jax[cuda12]" && JAX_PLATFORMS=cpu python benchmarks/deform_attn_gpu.py h100

Prints memory, and registers and spills as ptxas reports them. Nothing runs, and nothing here is a time.
"""

import argparse
import os
import tempfile
from pathlib import Path

# What XLA asks about a target: https://github.com/openxla/xla, GpuTargetConfigProto; numbers from data sheets.
TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: {cores}
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared} shared_memory_per_core: {shared}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 fpus_per_core: {units}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 clock_rate_ghz: {clock}
  memory_bandwidth: {bandwidth} device_memory_size: {memory} l2_cache_size: {cache}
  cuda_compute_capability {{ major: {capability} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""
HOPPER = dict(cores=132, shared=232448, units=128, clock=1.98, cache=52428800)
HOPPER["capability"] = "9 feature_extension: ACCELERATED_FEATURES"
GPUS = {
    "h100": HOPPER | dict(bandwidth=3352320000000, memory=84942979072),
    "h200": HOPPER | dict(bandwidth=4800000000000, memory=150000000000),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gpu", choices=GPUS)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder  # read when the compiler starts
        os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # a compilation found in the cache would dump nothing
        compile_kernel(options.gpu, options.dtype)
        for report in Path(folder).glob("*.ptxas"):
            print("".join(line for line in report.read_text().splitlines(True) if "Used" in line or "spill" in line))


def compile_kernel(gpu, dtype):
    import jax
    import numpy as np
    from deform_attn import LEVELS
    from jax import numpy as jnp
    from jax.experimental import topologies

    from esg_jax.ops.deform_attn import pallas_gpu

    config = TARGET.format(name=gpu, **GPUS[gpu])
    devices = topologies.get_topology_desc(gpu, "cuda", target_config=config, topology="1x1x1").devices
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    pixels = sum(height * width for height, width in LEVELS)
    samples = (1, pixels, 8, len(LEVELS), 4)
    shapes = ((1, pixels, 8, 32), jnp.dtype(dtype)), ((*samples, 2), jnp.float32), (samples, jnp.float32)
    arrays = [jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes]
    with jax.set_mesh(mesh):
        lowered = jax.jit(lambda values, *rest: pallas_gpu.forward(values, LEVELS, *rest)).lower(*arrays)
        memory = lowered.compile().memory_analysis()
    print(f"pallas_gpu forward, encoder shape, {dtype}, {gpu}: {memory.temp_size_in_bytes / 1e6:.0f} MB temporary")


if __name__ == "__main__":
    main()
