"""Device mesh and the table that says how every parameter is split over it.

Modules know nothing of meshes. A table is an ordered list of (pattern, placement); the first pattern found in a
parameter's dotted name decides. The optimiser's moments and the average weights are dictionaries with the same names,
so the same table places them.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = DATA, FSDP, MODEL = "data", "fsdp", "model"
BATCH_AXES = (DATA, FSDP)  # every image lives on one (data, fsdp) coordinate; `model` splits weights only
BATCH_SPEC = P(BATCH_AXES)


@dataclasses.dataclass(frozen=True)
class LargestDim:
    """Placement without naming dimensions: the largest one that `axis` divides is split, tiny arrays are not.

    Attributes:
        axis: mesh axis.
        min_size: arrays with fewer elements stay whole; gathering them would cost more than they weigh.
    """

    axis: str = FSDP
    min_size: int = 2**14


Placement = P | LargestDim
Rules = Sequence[tuple[str, Placement]]

# Tensor parallelism splits the middle of each pair of matrices: columns of the first, rows of the second. The last
# rule is the documented fallback; without it an unmatched parameter is an error.
DEFAULT_RULES: Rules = (
    # The language model and CLIP: a leading layer axis, which the scan over layers walks and nothing splits.
    (r"(^|\.)(llm|image_encoder)\.layers\..*attention\.(query|key|value)\.kernel$", P(None, FSDP, MODEL)),
    (r"(^|\.)(llm|image_encoder)\.layers\..*attention\.out\.kernel$", P(None, MODEL, FSDP)),
    (r"(^|\.)(llm|image_encoder)\.layers\..*(gate|up|fc1)\.kernel$", P(None, FSDP, MODEL)),
    (r"(^|\.)(llm|image_encoder)\.layers\..*(down|fc2)\.kernel$", P(None, MODEL, FSDP)),
    (r"(^|\.)llm\.embed\.embedding$", P(MODEL, FSDP)),
    (r"(^|\.)llm\.head\.kernel$", P(FSDP, MODEL)),
    (r"(scale|bias|relative_position_bias_table|_embed|query_feat)$", P()),
    (r"attention\.(query|key|value|qkv)\.kernel$", P(FSDP, MODEL)),
    (r"attention\.(out|proj)\.kernel$", P(MODEL, FSDP)),
    (r"(ffn\.mlp\.layers\.0|fc1)\.kernel$", P(FSDP, MODEL)),
    (r"(ffn\.mlp\.layers\.1|fc2)\.kernel$", P(MODEL, FSDP)),
    (r"", LargestDim()),
)


def format_rules(rules: Rules) -> tuple[tuple[str, str], ...]:
    """A table as plain text, for configurations; `parse_rules` reads it."""
    return tuple((pattern, _format_placement(placement)) for pattern, placement in rules)


def _format_placement(placement: Placement) -> str:
    if isinstance(placement, LargestDim):
        return f"largest:{placement.axis}:{placement.min_size}"
    return ",".join("+".join(_as_tuple(axes)) or "-" for axes in placement) or "whole"


def parse_rules(texts: Sequence[tuple[str, str]], where: str = "rules") -> Rules:
    """A table from text.

    Args:
        texts: ordered (pattern searched in the name, placement). A placement is "whole" (on every device); for every
            dimension an axis of the mesh, several joined by "+", or "-" for none, as in "-,fsdp,model"; or
            "largest:AXIS:MIN_SIZE", see `LargestDim`.
        where: for messages.

    Raises:
        ValueError: no such placement or axis, or a pattern that is none.
    """
    rules = []
    for number, (pattern, text) in enumerate(texts):
        try:
            re.compile(pattern)
            rules.append((pattern, _parse_placement(text)))
        except (ValueError, TypeError, AttributeError, re.error) as error:
            raise ValueError(
                f"{where}[{number}] is {(pattern, text)!r}; expected a pattern and 'whole', axes such as "
                f"'-,fsdp,model', or 'largest:fsdp:16384' (axes: {', '.join(AXES)})"
            ) from error
    return tuple(rules)


def _parse_placement(text: str) -> Placement:
    if text == "whole":
        return P()
    if text.startswith("largest:"):
        _, axis, size = text.split(":")
        placement = LargestDim(axis, int(size))
        named = [axis]
    else:
        axes = [() if part == "-" else tuple(part.split("+")) for part in text.split(",")]
        placement = P(*(None if not names else names[0] if len(names) == 1 else names for names in axes))
        named = [axis for names in axes for axis in names]
    if set(named) - set(AXES):
        raise ValueError(f"unknown axis in {text!r}")
    return placement


def make_mesh(data: int = 1, fsdp: int = -1, model: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh ("data", "fsdp", "model"); one size may be -1 and takes the devices that remain.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [data, fsdp, model]
    if sizes.count(-1) > 1:
        raise ValueError(f"mesh sizes (data, fsdp, model) = {tuple(sizes)}: only one of them may be -1")
    if -1 in sizes:
        rest = int(np.prod([size for size in sizes if size != -1]))
        sizes[sizes.index(-1)] = max(len(devices) // rest, 1)
    if int(np.prod(sizes)) != len(devices):
        raise ValueError(
            f"mesh sizes (data, fsdp, model) = {tuple(sizes)} need {int(np.prod(sizes))} devices, "
            f"but there are {len(devices)}; change config.mesh or --mesh"
        )
    # Auto, because the default of jax 0.10 (Explicit) refuses tensor-parallel matmuls without annotations.
    axis_types = (AxisType.Auto,) * 3
    return jax.make_mesh(tuple(sizes), AXES, devices=devices, axis_types=axis_types)


def parse_mesh(text: str) -> Mesh:
    """The mesh of all devices that "DATA,FSDP,MODEL" describes, such as "1,4,1".

    Raises:
        ValueError: not three numbers, or sizes that do not fit the devices.
    """
    try:
        data, fsdp, model = map(int, text.split(","))
    except ValueError as error:
        raise ValueError(f"mesh {text!r}: expected three numbers DATA,FSDP,MODEL such as 1,4,1") from error
    return make_mesh(data, fsdp, model)


def pin_batch(x: jax.Array) -> jax.Array:
    """States with their leading dimension, the batch, split over the devices; unchanged outside a mesh.

    For programs that the compiler partitions. Left alone it may follow the weights instead, and give every device
    the whole batch with a part of each product, to be summed.
    """
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, BATCH_SPEC)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where every parameter lies: `layout(name, shape)`, errors as in `partition_specs`."""

    mesh: Mesh
    rules: Rules = DEFAULT_RULES

    def __call__(self, name: str, shape: Sequence[int]) -> NamedSharding:
        return NamedSharding(self.mesh, _place(name, tuple(shape), self.rules, self.mesh))


def partition_specs(shapes: Mapping[str, Any], rules: Rules, mesh: Mesh) -> dict[str, P]:
    """PartitionSpec of every named parameter.

    Args:
        shapes: dotted name -> anything with a `shape`.
        rules: ordered (regular expression searched in the name, placement).
        mesh: its axis sizes must divide the dimensions they split.

    Raises:
        ValueError: no rule matches a parameter, a spec has more entries than the parameter has dimensions, or an axis
            does not divide its dimension; the message names parameter and rule.
    """
    return {name: _place(name, tuple(value.shape), rules, mesh) for name, value in shapes.items()}


def _place(name: str, shape: tuple[int, ...], rules: Rules, mesh: Mesh) -> P:
    pattern, placement = next((rule for rule in rules if re.search(rule[0], name)), (None, None))
    if placement is None:
        raise ValueError(f"no sharding rule matches parameter {name!r} of shape {shape}; add one to the table")
    if isinstance(placement, LargestDim):
        return _split_largest(shape, placement, mesh)
    if len(placement) > len(shape):
        raise ValueError(f"rule {pattern!r} -> {placement} has more entries than {name!r} of shape {shape}")
    for dim, axes in enumerate(placement):
        parts = int(np.prod([mesh.shape[axis] for axis in _as_tuple(axes)], initial=1))
        if shape[dim] % parts:
            raise ValueError(
                f"rule {pattern!r} -> {placement} splits dimension {dim} of {name!r} with shape {shape} in {parts}, "
                f"which does not divide {shape[dim]}; change the table or config.mesh"
            )
    return placement


def _as_tuple(axes: Any) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _split_largest(shape: tuple[int, ...], placement: LargestDim, mesh: Mesh) -> P:
    parts = mesh.shape[placement.axis]
    if parts == 1 or int(np.prod(shape)) < placement.min_size:
        return P()
    # Ties go to the last dimension, the fastest varying one.
    for dim in sorted(range(len(shape)), key=lambda d: (shape[d], d), reverse=True):
        if shape[dim] % parts == 0:
            return P(*[placement.axis if d == dim else None for d in range(len(shape))])
    return P()


def tree_shardings(tree: Any, specs: Mapping[str, P], mesh: Mesh) -> Any:
    """NamedSharding of every leaf of `tree`: those stored under a parameter's name get its spec, others are replicated.

    Covers parameters, optimiser moments and averages at once, because all are dictionaries keyed by parameter name.
    """

    def place(path, _):
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey) and entry.key in specs]
        return NamedSharding(mesh, specs[names[-1]] if names else P())

    return jax.tree_util.tree_map_with_path(place, tree)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's part of a batch on its devices; the result is one global array per entry.

    Raises:
        ValueError: the batch does not divide over the (data, fsdp) devices.
    """
    shards = mesh.shape[DATA] * mesh.shape[FSDP]
    sharding = NamedSharding(mesh, BATCH_SPEC)
    out = {}
    for name, value in batch.items():
        rows = len(value) * jax.process_count()
        if rows % shards:
            raise ValueError(
                f"batch size {rows} does not divide over {shards} devices (data x fsdp); change "
                "config.data.batch_size or config.mesh"
            )
        out[name] = jax.make_array_from_process_local_data(sharding, np.asarray(value))
    return out
