"""A model on a mesh of devices: its weights are placed once, programs are compiled once, batches are split.

Predictors say what is computed; where it happens is decided here, in the same way for one device, for weights split
over many (FSDP, tensor parallelism), and for several hosts. On a mesh of several processes all of them call with the
same arguments and get the same results; each supplies the pixels of the rows that lie on its devices.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from esg_jax import sharding
from esg_jax.sharding import BATCH_AXES, BATCH_SPEC, DEFAULT_RULES, Rules


class Engine:
    """Programs of one model.

    Args:
        model: its arrays may lie on a mesh already (those of a training state), and then stay as they are.
        mesh: of `sharding.make_mesh`; default: that of the arrays, if they lie on one, else one device.
        rules: how arrays that are not on the mesh yet are split over it.

    Raises:
        ValueError: the rules do not fit the model, see `sharding.partition_specs`.
    """

    def __init__(self, model: nnx.Module, mesh: Mesh | None = None, rules: Rules = DEFAULT_RULES):
        self._graph, state = nnx.split(model)
        self.mesh = mesh or _mesh_of(state)
        layout = sharding.Layout(self.mesh, rules)
        flat = [
            (path, variable.replace(_on_mesh(".".join(map(str, path)), variable.get_value(), layout)))
            for path, variable in nnx.to_flat_state(state)
        ]
        self.state = nnx.from_flat_state(flat)
        self._shards = self.mesh.shape[sharding.DATA] * self.mesh.shape[sharding.FSDP]

    def batch_size(self, wanted: int) -> int:
        """The least number of images that is not below `wanted` and divides over the devices."""
        return -(-wanted // self._shards) * self._shards

    def own_rows(self, count: int) -> range:
        """Rows of a batch of `count` whose pixels this process supplies."""
        rows = NamedSharding(self.mesh, P(BATCH_AXES)).addressable_devices_indices_map((count,)).values()
        bounds = [index[0].indices(count) for index in rows]
        return range(min(start for start, *_ in bounds), max(stop for _, stop, _ in bounds))

    def per_image(self, function: Callable, part: Callable[[nnx.Module], nnx.Module] | None = None) -> "Program":
        """Compiles `function(module, *arrays)`, where every device works on its own images.

        For networks with kernels, matching or loops that the compiler cannot split. The weights of `part(model)` are
        gathered for the time of the program; without `part`, `function` takes arrays alone.
        """
        axes = set(self.mesh.axis_names) if self.mesh.shape[sharding.MODEL] == 1 else set(BATCH_AXES)

        def program(state, *arrays):
            graph, weights = (None, ()) if part is None else nnx.split(part(nnx.merge(self._graph, state)))

            def local(weights, *arrays):
                return function(*arrays) if part is None else function(nnx.merge(graph, weights), *arrays)

            specs = dict(in_specs=(P(), *[BATCH_SPEC] * len(arrays)), out_specs=BATCH_SPEC, axis_names=axes)
            return jax.shard_map(local, mesh=self.mesh, **specs, check_vma=False)(weights, *arrays)

        return Program(self, jax.jit(program), () if part is None else self.state)

    def whole_batch(self, function: Callable) -> "Program":
        """Compiles `function(model, *arrays, **static)`; the compiler splits it along batch and weights.

        For language models, whose weights need not be gathered at once: `sharding.pin_batch` keeps states in place.
        """

        @functools.partial(jax.jit, static_argnames="static")
        def program(state, *arrays, static=()):
            return function(nnx.merge(self._graph, state), *arrays, **dict(static))

        return Program(self, program, self.state)

    def put(self, array: Any) -> jax.Array:
        """A batch as one array over the devices; what is on devices already stays there."""
        if isinstance(array, jax.Array):
            return array
        place = NamedSharding(self.mesh, BATCH_SPEC)
        return jax.make_array_from_callback(np.shape(array), place, lambda index: np.asarray(array)[index])

    def fetch(self, tree: Any) -> Any:
        """Arrays on the host, the whole batch in every process."""
        if self.mesh.is_multi_process:
            return multihost_utils.process_allgather(tree, tiled=True)
        return jax.device_get(tree)


class Program:
    """A compiled function of batches: arrays of the host, or what another program returned."""

    def __init__(self, engine: Engine, compiled: Callable, state: Any):
        self._engine, self._compiled, self._state = engine, compiled, state

    def __call__(self, *arrays: Any, **static: Any) -> Any:
        """Runs it; `static` are values that a program is compiled for."""
        options = {"static": tuple(sorted(static.items()))} if static else {}
        with jax.set_mesh(self._engine.mesh):
            return self._compiled(self._state, *jax.tree.map(self._engine.put, arrays), **options)

    @property
    def num_variants(self) -> int:
        """How often it was compiled."""
        return self._compiled._cache_size()


def _mesh_of(state: nnx.State) -> Mesh:
    for _, variable in nnx.to_flat_state(state):
        mesh = getattr(getattr(variable.get_value(), "sharding", None), "mesh", None)
        if mesh is not None and mesh.axis_names == sharding.AXES:
            return mesh
    return sharding.make_mesh(1, 1, 1, devices=jax.local_devices()[:1])


def _on_mesh(name: str, array: Any, layout: sharding.Layout) -> jax.Array:
    if getattr(getattr(array, "sharding", None), "mesh", None) == layout.mesh:
        return array
    return jax.device_put(array, layout(name, array.shape))


def fill(array: np.ndarray, count: int) -> np.ndarray:
    """Repeats the last item until there are `count`."""
    return np.concatenate([array, np.repeat(array[-1:], count - len(array), axis=0)])


def batches(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """The items in groups of `size`; the last may be smaller."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def read_ahead(function: Callable, items: Iterable[Any], num_threads: int) -> Iterator[Any]:
    """`function(item)` in order, computed in threads; one item per thread, and one more, is ahead of the consumer."""
    with ThreadPoolExecutor(num_threads) as pool:
        source = iter(items)
        pending = [pool.submit(function, item) for item in islice(source, num_threads + 1)]
        while pending:
            result = pending.pop(0).result()
            pending.extend(pool.submit(function, item) for item in islice(source, 1))
            yield result
