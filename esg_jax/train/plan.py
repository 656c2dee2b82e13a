"""Compiles for TPUs that are not there: does a run fit its chips, and what does a step cost?

The real TPU compiler (libtpu, from the `tpu` extra) works on any Linux machine; nothing is executed.
"""

import dataclasses
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from esg_jax.models.language.llama import KVCache, Llama, LlamaConfig
from esg_jax.models.language.quantized import quantize
from esg_jax.sharding import make_mesh
from esg_jax.systems import ModelConfig, system_of
from esg_jax.train.config import PRECISIONS, RunConfig, model_def


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the compiler reports, per chip unless said otherwise.

    Attributes:
        chips: number of chips of the topology that the program uses.
        peak_bytes: largest memory in use at one time, by the compiler's own count.
        argument_bytes, temporary_bytes: inputs, and everything allocated while running. Their sum is an upper bound
            of the peak.
        flops: multiply-adds counted as two operations, as far as XLA counts them.
        collectives: number of communication operations by kind.
        compile_s: seconds of wall time.
    """

    chips: int
    peak_bytes: int
    argument_bytes: int
    temporary_bytes: int
    flops: float
    collectives: dict[str, int]
    compile_s: float

    def __str__(self):
        gib = 2**30
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.collectives.items()) or "none"
        return (
            f"{self.chips} chip(s); per chip: peak {self.peak_bytes / gib:.2f} GiB (arguments "
            f"{self.argument_bytes / gib:.2f} + temporaries {self.temporary_bytes / gib:.2f} GiB at most), "
            f"{self.flops / 1e12:.2f} TFLOP; collectives: {kinds}; compiled in {self.compile_s:.0f} s"
        )


def tpu_devices(topology: str) -> list:
    """Descriptions of the chips of a slice such as "v5e:4x4".

    Raises:
        RuntimeError: libtpu is not installed, or does not know the topology.
    """
    # Without these, libtpu asks a metadata server that only exists on TPU machines, or waits for real chips.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(topology, platform="tpu").devices)
    except Exception as error:  # jax raises several kinds, depending on what is missing
        raise RuntimeError(
            f"cannot plan for {topology!r}: {error}. It needs libtpu (pip install 'esg_jax[tpu]') and a "
            "topology such as v5e:2x2 or v5e:4x4"
        ) from error


def plan_training(config: RunConfig, topology: str, height: int = 0, width: int = 0) -> Plan:
    """Compiles the training step of a run, laid out by `config.mesh`.

    Args:
        config: of the run.
        topology: of the slice.
        height, width: padded size of the views in pixels, for systems whose configuration does not say it.
    """
    devices = tpu_devices(topology)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.model, devices=devices)
    step = config.train_step(mesh=mesh)
    start = time.monotonic()
    return _report(step.lower(config.system.batch_shapes(config, height, width)).compile(), len(devices), start)


def plan_inference(
    model: ModelConfig, topology: str, height: int, width: int, *, views: int = 5, precision: str = "bfloat16"
) -> Plan:
    """Compiles the forward pass for one image with all its views on one chip; mask logits at stride 4 come out."""
    device = tpu_devices(topology)[:1]
    place = NamedSharding(Mesh(np.array(device), ("data",)), P())
    system, definition = system_of(model), model_def(model, PRECISIONS[precision])

    def run(params, constants, image, size):
        return system.outputs(definition.merge(params, constants), image, size)

    def shaped(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

    image = jax.ShapeDtypeStruct((1, views, height, width, 3), jnp.uint8)
    size = jax.ShapeDtypeStruct((1, views, 2), jnp.int32)
    arguments = shaped((definition.params, definition.constants, image, size))
    start = time.monotonic()
    return _report(jax.jit(run).lower(*arguments).compile(), 1, start)


def plan_decoding(llm: LlamaConfig, topology: str, *, batch: int = 1, length: int = 2048, int8: bool = True) -> Plan:
    """Compiles one step of text generation on one chip.

    Args:
        llm: sizes of the language model; it computes in bfloat16.
        topology: whose first chip is planned for.
        batch, length: rows and slots of the key/value cache.
        int8: kernels as int8, otherwise bfloat16.
    """
    place = NamedSharding(Mesh(np.array(tpu_devices(topology)[:1]), ("data",)), P())

    def build():
        model = Llama(llm, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
        return quantize(model) if int8 else model

    graph, state = nnx.split(nnx.eval_shape(build))

    def step(cache, state, ids_b):
        model = nnx.merge(graph, state)
        hidden, cache = model(model.embed(ids_b[:, None]), cache=cache)
        return cache, jnp.argmax(model.logits(hidden[:, 0]), axis=-1)

    cache = jax.eval_shape(lambda: KVCache.empty(llm, batch, length, jnp.bfloat16))
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        (cache, state, jax.ShapeDtypeStruct((batch,), jnp.int32)),
    )
    start = time.monotonic()
    return _report(jax.jit(step, donate_argnums=0).lower(*arguments).compile(), 1, start)


def _report(compiled: jax.stages.Compiled, chips: int, start: float) -> Plan:
    memory, text = compiled.memory_analysis(), compiled.as_text()
    kinds = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
    counts = {kind: text.count(f" {kind}(") + text.count(f" {kind}-start(") for kind in kinds}
    return Plan(
        chips=chips,
        peak_bytes=memory.peak_memory_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        flops=(compiled.cost_analysis() or {}).get("flops", 0.0),
        collectives={kind: count for kind, count in counts.items() if count},
        compile_s=time.monotonic() - start,
    )
