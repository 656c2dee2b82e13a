"""Time to compile and to run one training step of a config on this machine.

    python -m data.scenes --out /tmp/scenes --count 16 --long-side 800 1100
    python -m benchmarks.training_step configs/quickstart.py:/tmp/scenes --steps 8

Prints seconds of wall time and of the processor (all threads) for tracing, compiling and the fastest and the median
step, the memory of temporaries, and the size of the program. The first batch is used again and again. Without
`--default-allocator` memory stays with the process, as in `train.py` (esg_jax/allocator.py).
"""

import sys

from esg_jax.allocator import keep_memory

if __name__ == "__main__" and "--default-allocator" not in sys.argv:
    keep_memory()

import argparse
import contextlib
import importlib.util
import statistics
import time

import jax

from esg_jax.systems import system_of
from esg_jax.train.config import RunConfig


def load(text: str) -> RunConfig:
    """The run of FILE or FILE:ARGUMENT."""
    file, _, argument = text.partition(":")
    spec = importlib.util.spec_from_file_location("config", file)
    if spec is None or not spec.loader:
        raise SystemExit(f"error: {file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return RunConfig.from_dict(module.get_config(*([argument] if argument else [])).to_dict())


@contextlib.contextmanager
def timed(times: list[tuple[float, float]]):
    """Appends (wall, processor) seconds of the block."""
    wall, processor = time.perf_counter(), time.process_time()
    yield
    times.append((time.perf_counter() - wall, time.process_time() - processor))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="FILE or FILE:ARGUMENT")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--default-allocator", action="store_true", help="do not keep memory")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)

    run = load(arguments.config)
    step = run.train_step()
    with contextlib.closing(system_of(run.model).batches(run, 0, 1)) as batches:
        batch = jax.device_put(dict(step.task.inputs(next(batches))))
    state = step.init()
    tracing, compiling, running = [], [], []
    with timed(tracing):
        lowered = step.trace(state, batch).lower()
    with timed(compiling):
        compiled = lowered.compile()
    for _ in range(arguments.steps + 1):
        with timed(running):
            state, metrics = compiled(state, batch, step.settings)
            jax.block_until_ready(metrics)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, loss {float(metrics['loss']):.3f}")
    rows = {
        "trace and lower": tracing[0],
        "compile": compiling[0],
        "step, fastest": min(running[1:]),
        "step, median": tuple(map(statistics.median, zip(*running[1:], strict=True))),
    }
    for name, (wall, processor) in rows.items():
        print(f"{name:16s} {wall:7.2f} s wall, {processor:7.2f} s of the processor")
    memory, lines = compiled.memory_analysis(), lowered.as_text().count("\n")
    print(f"temporaries {memory.temp_size_in_bytes / 2**20:.0f} MiB; {lines} lines of StableHLO")


if __name__ == "__main__":
    main()
