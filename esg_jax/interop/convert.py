"""Conversion of named arrays with a `Table`, accounting for every name on both sides."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from esg_jax.interop.readers import CheckpointReader
from esg_jax.interop.rules import Buffer, Index, Rule, Table, fill
from esg_jax.weights import named_arrays

# Under which a checkpoint that we write carries our configuration in its metadata.
CONFIG_KEY = "esg_jax_config"
_SHOWN = 20


class ConversionError(ValueError):
    """Names or shapes on the two sides do not fit together."""


@dataclasses.dataclass
class Report:
    """What happened to every name.

    Attributes:
        used: their tensors that became parameters.
        buffers: their tensors that were recomputed and agreed.
        dropped: their tensors the format lists as having no counterpart.
        ignored: their unknown tensors that `allow_unused` matched.
        missing: our parameters without a source that `allow_missing` matched.
        grown: our parameters that have more rows than their source; the mean of the others fills them.
    """

    used: list[str] = dataclasses.field(default_factory=list)
    buffers: list[str] = dataclasses.field(default_factory=list)
    dropped: list[str] = dataclasses.field(default_factory=list)
    ignored: list[str] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)
    grown: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{len(self.used)} tensors converted"]
        for name in ("buffers", "dropped", "ignored", "missing", "grown"):
            names = getattr(self, name)
            if names:
                detail = "" if name == "buffers" else f" ({_listing(names, 4)})"
                parts.append(f"{len(names)} {name}{detail}")
        return ", ".join(parts)


class Stacked:
    """An array whose first axis counts layers, read one by one: iterate over it, or `np.asarray` it."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, layer: Callable[[int], np.ndarray]):
        self.shape = shape
        self.dtype = dtype
        self._layer = layer

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self._layer, range(self.shape[0]))

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        out = np.empty(self.shape, dtype or self.dtype)
        for index, layer in enumerate(self):
            out[index] = layer
        return out


def _listing(names: list[str], shown: int = _SHOWN) -> str:
    names = sorted(names)
    return ", ".join(names[:shown]) + (f", ... ({len(names)} in all)" if len(names) > shown else "")


def plan(theirs: list[str], table: Table) -> tuple[dict[tuple[Rule, tuple], dict[str, str]], dict[str, Any], list[str]]:
    """Sorts their names: {(rule, index values): {template: name}}, {name: buffer or "dropped"}, [unknown names].

    Raises:
        ConversionError: two names mean the same tensor.
    """
    rules = Index((template, rule) for rule in table.rules for template in rule.theirs)
    buffers = Index((buffer.theirs, buffer) for buffer in table.buffers)
    dropped = [re.compile(pattern) for pattern in table.dropped]
    groups: dict[tuple[Rule, tuple], dict[str, str]] = {}
    other: dict[str, Any] = {}
    unknown = []
    for name in theirs:
        renamed = name
        for pattern, replacement in table.renames:
            renamed = re.sub(pattern, replacement, renamed)
        if found := rules.find(renamed):
            rule, values = found
            parts = groups.setdefault((rule, tuple(sorted(values.items()))), {})
            if renamed in parts:
                raise ConversionError(f"{name} and {parts[renamed]} are the same tensor under two names")
            parts[renamed] = name
        elif found := buffers.find(renamed):
            other[name] = found
        elif any(pattern.fullmatch(renamed) for pattern in dropped):
            other[name] = "dropped"
        else:
            unknown.append(name)
    return groups, other, unknown


def stream_to_ours(
    state: Mapping[str, np.ndarray],
    targets: Mapping[str, Any],
    table: Table,
    *,
    allow_missing: str | None = None,
    allow_unused: str | None = None,
    report: Report | None = None,
) -> Iterator[tuple[str, np.ndarray | Stacked]]:
    """Yields (our name, array) one rule at a time, in the order of `targets`; names are checked before the first one.

    Arrays that stack layers come as `Stacked`, which reads a layer when it is asked for.

    Args:
        state: their tensors; a `CheckpointReader` is read as the iteration goes on, so that only the tensors of one
            rule are in memory.
        targets: our name -> anything with `shape` and `dtype`, the arrays to be filled.
        table: the format of `state`.
        allow_missing: regular expression (matched anywhere) of our names that may stay without a source.
        allow_unused: regular expression of their unknown names that may be ignored.
        report: filled in, when given.

    Raises:
        ConversionError: names without a partner, different shapes, numbers of the wrong kind, or a stored buffer that
            does not have the value it must have.
    """
    report = Report() if report is None else report
    groups, other, unknown = plan(list(state), table)
    allowed = re.compile(allow_unused) if allow_unused else None
    report.ignored += [name for name in unknown if allowed and allowed.search(name)]
    unknown = [name for name in unknown if name not in set(report.ignored)]

    sources: dict[str, tuple[Rule, tuple[str, ...]]] = {}
    layers: dict[str, dict[int, str]] = {}
    incomplete, orphans = [], []
    for (rule, values), parts in groups.items():
        theirs = [fill(template, dict(values)) for template in rule.theirs]
        ours = [fill(template, dict(values)) for template in rule.ours]
        absent = [name for name in theirs if name not in parts]
        layer = dict(values)[rule.stacked] if rule.stacked else 0
        if absent:
            incomplete += absent
        elif not any(name in targets for name in ours) or (rule.stacked and layer >= targets[ours[0]].shape[0]):
            orphans += parts.values()
        elif rule.stacked:
            layers.setdefault(ours[0], {})[layer] = parts[theirs[0]]
            sources[ours[0]] = (rule, ())
            report.used += parts.values()
        else:
            names = tuple(parts[name] for name in theirs)
            sources.update((name, (rule, names)) for name in ours)
            report.used += names
    for name, found in layers.items():
        rule, _ = sources[name]
        count = targets[name].shape[0]
        incomplete += [fill(rule.theirs[0], {rule.stacked: i}) for i in range(count) if i not in found]
        sources[name] = (rule, tuple(found[i] for i in sorted(found)))
    report.ignored += [name for name in orphans if allowed and allowed.search(name)]
    unknown += [name for name in orphans if name not in set(report.ignored)]

    missing = [name for name in targets if name not in sources]
    permitted = re.compile(allow_missing) if allow_missing else None
    report.missing += [name for name in missing if permitted and permitted.search(name)]
    missing = [name for name in missing if name not in set(report.missing)]
    for name, found in other.items():
        (report.dropped if found == "dropped" else report.buffers).append(name)
    problems = []
    if unknown:
        problems.append(f"no use for {_listing(unknown)}")
    if incomplete:
        problems.append(f"the checkpoint lacks {_listing(incomplete)}")
    if missing:
        problems.append(f"the checkpoint has nothing for our {_listing(missing)}")
    if problems:
        raise ConversionError(
            "; ".join(problems) + ". If that is intended, name them with --allow-unused or --allow-missing REGEX"
        )
    yield from _convert(state, targets, sources, report)
    _check_buffers(state, targets, other, sources)


def _convert(state, targets, sources, report: Report) -> Iterator[tuple[str, np.ndarray | Stacked]]:
    done: dict[str, np.ndarray] = {}
    for name, target in targets.items():
        if name not in sources:
            continue
        rule, theirs = sources[name]
        if rule.stacked:
            yield name, _stack(state, name, target, rule, theirs)
            continue
        if name not in done:
            values = dict(_fields(rule, name))
            ours = [fill(template, values) for template in rule.ours]
            done.update(zip(ours, _apply(rule, state, theirs, name, target.shape), strict=True))
        array = done.pop(name)
        if rule.growing is not None and array.shape[rule.growing] < target.shape[rule.growing]:
            report.grown.append(name)
            array = _grown(array, rule.growing, target.shape[rule.growing])
        yield name, _fitted(array, theirs, name, tuple(target.shape), target.dtype)


def _stack(state, name: str, target, rule: Rule, theirs: tuple[str, ...]) -> Stacked:
    shape = tuple(target.shape)

    def layer(index):
        (array,) = _apply(rule, state, theirs[index : index + 1], name, shape[1:])
        return _fitted(array, theirs[index : index + 1], f"{name}[{index}]", shape[1:], target.dtype)

    return Stacked(shape, target.dtype, layer)


def _apply(rule: Rule, state, theirs: tuple[str, ...], name: str, shape) -> tuple[np.ndarray, ...]:
    arrays = [state[source] for source in theirs]
    try:
        return tuple(rule.layout.to_ours(*arrays))
    except (ValueError, IndexError) as error:
        shapes = ", ".join(f"{source} {array.shape}" for source, array in zip(theirs, arrays, strict=True))
        raise ConversionError(f"{shapes} cannot become {name} {tuple(shape)}: {error}") from error


def _grown(array: np.ndarray, axis: int, size: int) -> np.ndarray:
    """The array with its mean appended along `axis`: a new token starts with an average embedding and score."""
    mean = array.mean(axis, dtype=np.float64, keepdims=True).astype(array.dtype)
    return np.concatenate([array, np.repeat(mean, size - array.shape[axis], axis)], axis)


def _fitted(array: np.ndarray, theirs: tuple[str, ...], name: str, shape: tuple[int, ...], dtype) -> np.ndarray:
    if array.shape != shape:
        raise ConversionError(f"{', '.join(theirs)} gives {name} the shape {array.shape}, the model needs {shape}")
    if jnp.issubdtype(array.dtype, jnp.floating) != jnp.issubdtype(dtype, jnp.floating):
        raise ConversionError(f"{', '.join(theirs)} holds {array.dtype} numbers, {name} needs {dtype}")
    if array.dtype == dtype and not array.flags.c_contiguous:  # numpy moves plain integers faster than bfloat16
        return np.ascontiguousarray(array.view(f"u{array.dtype.itemsize}")).view(dtype)
    return array.astype(dtype, order="C", copy=False)  # type and order in one copy


def _fields(rule: Rule, name: str):
    _, values = Index((template, rule) for template in rule.ours).find(name)
    return values.items()


def _check_buffers(state, targets, other, sources) -> None:
    for name, found in other.items():
        if found == "dropped":
            continue
        buffer, values = found
        like = fill(buffer.like, values)
        if not buffer.checked or like not in targets or like not in sources:
            continue
        expected = buffer.make(np.broadcast_to(np.zeros((), np.float32), targets[like].shape))
        actual = state[name]
        if actual.shape != expected.shape or not np.allclose(actual, expected):
            raise ConversionError(
                f"{name} {actual.shape} does not have the value that {like} {tuple(targets[like].shape)} implies; "
                "the checkpoint uses another window size or another loss weight"
            )


def to_ours(
    state: Mapping[str, np.ndarray], targets: Mapping[str, Any], table: Table, **kwargs
) -> tuple[dict[str, np.ndarray], Report]:
    """All of `stream_to_ours` in memory, and the report."""
    report = Report()
    arrays = stream_to_ours(state, targets, table, report=report, **kwargs)
    return {name: np.asarray(array) for name, array in arrays}, report


def stream_from_ours(arrays: Mapping[str, Any], table: Table) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (their name, array or view) for every array of ours, then the buffers.

    Stacked arrays of a `CheckpointReader` are read layer by layer.

    Raises:
        ConversionError: an array of ours that the format has no place for.
    """
    rules = Index((template, rule) for rule in table.rules for template in rule.ours)
    seen = set()
    unknown = [name for name in arrays if rules.find(name) is None]
    if unknown:
        raise ConversionError(f"the format has no place for {_listing(unknown)}")
    for name in arrays:
        rule, values = rules.find(name)
        if rule.stacked:
            for index, array in enumerate(_layers(arrays, name)):
                (part,) = rule.layout.to_theirs(array)
                yield fill(rule.theirs[0], {**values, rule.stacked: index}), part
            continue
        key = (rule.theirs[0], tuple(sorted(values.items())))
        if key in seen:
            continue
        seen.add(key)
        ours = [fill(template, values) for template in rule.ours]
        absent = [part for part in ours if part not in arrays]
        if absent:
            raise ConversionError(f"{name} belongs with {_listing(absent)}, which the model does not have")
        parts = rule.layout.to_theirs(*(np.asarray(arrays[part]) for part in ours))
        for template, part in zip(rule.theirs, parts, strict=True):
            yield fill(template, values), part
    likes = _buffers_by_name(arrays, table)
    for name, (buffer, like) in likes.items():
        yield name, buffer.make(np.asarray(arrays[like]))


def our_shapes(reader: CheckpointReader, table: Table) -> dict[str, tuple[int, ...]]:
    """Our name -> shape for everything in the checkpoint that the table knows, without reading any tensor."""
    groups, _, _ = plan(list(reader), table)
    shapes: dict[str, tuple[int, ...]] = {}
    for (rule, values), parts in groups.items():
        theirs = [fill(template, dict(values)) for template in rule.theirs]
        if all(name in parts for name in theirs):
            empty = [np.broadcast_to(np.zeros((), np.bool_), reader.shape(parts[name])) for name in theirs]
            ours = (fill(template, dict(values)) for template in rule.ours)
            try:
                for name, x in zip(ours, rule.layout.to_ours(*empty), strict=True):
                    if rule.stacked:
                        count = max(dict(values)[rule.stacked] + 1, shapes.get(name, (0,))[0])
                        shapes[name] = (count, *x.shape)
                    else:
                        shapes[name] = x.shape
            except (ValueError, IndexError) as error:
                raise ConversionError(f"{', '.join(theirs)}: shape {empty[0].shape} does not fit: {error}") from error
    return shapes


def subset(arrays: Mapping[str, Any], names: Iterable[str]) -> Mapping[str, Any]:
    """These arrays alone; of a `CheckpointReader` another one."""
    return arrays.only(names) if isinstance(arrays, CheckpointReader) else {name: arrays[name] for name in names}


def empty_like(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays of the same shapes and types that take no memory; nothing is read for them."""
    reader = isinstance(arrays, CheckpointReader)
    kinds = (
        {name: (arrays.shape(name), arrays.dtype(name)) for name in arrays}
        if reader
        else {name: (x.shape, x.dtype) for name, x in arrays.items()}
    )
    return {name: np.broadcast_to(np.zeros((), dtype), shape) for name, (shape, dtype) in kinds.items()}


def _layers(arrays: Mapping[str, Any], name: str) -> Iterator[np.ndarray]:
    if isinstance(arrays, CheckpointReader):
        return (arrays.layer(name, index) for index in range(arrays.shape(name)[0]))
    return iter(np.asarray(arrays[name]))


def _buffers_by_name(arrays, table: Table) -> dict[str, tuple[Buffer, str]]:
    found = {}
    for buffer in table.buffers:
        index = Index([(buffer.like, buffer)])
        for name in arrays:
            if hit := index.find(name):
                found[fill(buffer.theirs, hit[1])] = (buffer, name)
    return found


def from_ours(arrays: Mapping[str, Any], table: Table) -> dict[str, np.ndarray]:
    """All of `stream_from_ours` in memory."""
    return dict(stream_from_ours(arrays, table))


def load_into(model: nnx.Module, arrays: Iterator[tuple[str, np.ndarray]] | Mapping[str, np.ndarray]) -> nnx.Module:
    """The model with the named arrays in place of its own; arrays that are not named keep their values.

    Args:
        model: concrete, or abstract from `nnx.eval_shape`; it is not changed.
        arrays: our dotted names and values, for example from `stream_to_ours`.

    Raises:
        ConversionError: a name the model does not have, or an abstract array that stays without a value.
    """
    graph, state = nnx.split(model)
    flat = {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)}
    filled = {path: variable for path, variable in flat.values()}
    for name, value in arrays.items() if isinstance(arrays, Mapping) else arrays:
        if name not in flat:
            raise ConversionError(f"the model has no {name}")
        path, variable = flat[name]
        filled[path] = variable.replace(jnp.asarray(value, variable.get_value().dtype))
    empty = [name for name, (path, _) in flat.items() if isinstance(filled[path].get_value(), jax.ShapeDtypeStruct)]
    if empty:
        raise ConversionError(f"nothing was loaded for {_listing(empty)}")
    return nnx.merge(graph, nnx.from_flat_state(filled))


def targets_of(model: nnx.Module) -> dict[str, Any]:
    """Our name -> array (or abstract array) of everything a checkpoint must fill."""
    return named_arrays(model)
