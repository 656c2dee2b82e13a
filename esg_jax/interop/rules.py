"""Tables that translate between PyTorch's parameter names and layouts and ours, in both directions.

A table is data: each `Rule` pairs name templates of both sides and names the change of layout between them. Templates
hold indices in braces, possibly scaled and shifted on one side: ``layer.{i}`` <-> ``blocks.{i+1}``,
``features.{s*2+1}`` <-> ``stages.{s}``.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

_INDEX = re.compile(r"\{(\w+?)(?:\*(\d+))?(?:\+(\d+))?\}")


@dataclasses.dataclass(frozen=True)
class Layout:
    """A change of layout: a function of one or several arrays for each direction."""

    to_ours: Callable[..., Any]
    to_theirs: Callable[..., Any]


def _each(function: Callable[[np.ndarray], np.ndarray]) -> Callable[..., tuple[np.ndarray, ...]]:
    return lambda *arrays: tuple(function(array) for array in arrays)


def _permute(*axes: int) -> Layout:
    inverse = tuple(np.argsort(axes))
    return Layout(_each(lambda x: x.transpose(axes)), _each(lambda x: x.transpose(inverse)))


SAME = Layout(_each(lambda x: x), _each(lambda x: x))
LINEAR = _permute(1, 0)  # (out, in) <-> (in, out)
CONV = _permute(2, 3, 1, 0)  # OIHW <-> HWIO, also depthwise
POINTWISE = Layout(_each(lambda x: x[:, :, 0, 0].T), _each(lambda x: x.T[:, :, None, None]))  # 1x1 as a matrix
# One packed (3C, ...) array of query, key and value rows <-> three of ours.
SPLIT_LINEAR = Layout(
    lambda x: tuple(part.T for part in _thirds(x)), lambda *parts: (np.concatenate([part.T for part in parts]),)
)
SPLIT_VECTOR = Layout(lambda x: tuple(_thirds(x)), lambda *parts: (np.concatenate(parts),))
# Three of theirs <-> one packed array of ours.
JOIN_LINEAR = Layout(
    lambda *parts: (np.concatenate([part.T for part in parts], axis=1),),
    lambda x: tuple(part.T for part in np.split(x, 3, axis=1)),
)
JOIN_VECTOR = Layout(lambda *parts: (np.concatenate(parts),), lambda x: tuple(np.split(x, 3)))


def _thirds(x: np.ndarray) -> list[np.ndarray]:
    if x.shape[0] % 3:
        raise ValueError(f"{x.shape[0]} rows do not split into query, key and value")
    return np.split(x, 3)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One correspondence of parameters: their name templates, our name templates, the layout between them."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    layout: Layout = SAME
    # Index in their template that is the first axis of our array: their layers, stacked. One name on either side.
    stacked: str | None = None
    # Axis of our array (after `layout`, before stacking) that may be longer than theirs: rows for new tokens.
    growing: int | None = None


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A tensor of theirs that carries no information: recomputed when writing, checked when reading.

    `make` computes it from the arrays of ours named by `like`. `checked=False` accepts any content.
    """

    theirs: str
    like: str
    make: Callable[[np.ndarray], np.ndarray]
    checked: bool = True


@dataclasses.dataclass(frozen=True)
class Table:
    """A checkpoint format.

    Attributes:
        rules: parameters.
        buffers: tensors that are recomputed.
        renames: (pattern, replacement) of other spellings, applied to their names before the rules.
        dropped: patterns of their tensors that have no counterpart here, such as a classifier's head.
    """

    rules: tuple[Rule, ...]
    buffers: tuple[Buffer, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    dropped: tuple[str, ...] = ()

    def __add__(self, other: "Table") -> "Table":
        return Table(
            self.rules + other.rules,
            self.buffers + other.buffers,
            self.renames + other.renames,
            self.dropped + other.dropped,
        )

    def prefixed(self, theirs: str, ours: str) -> "Table":
        """The same table below a prefix on either side; patterns without ``^`` are left to match anywhere."""

        def rename(pattern: str, new: str) -> tuple[str, str]:
            anchored = pattern.startswith("^")
            return ("^" + re.escape(theirs) + pattern[1:], theirs + new) if anchored else (pattern, new)

        def rule(rule: Rule) -> Rule:
            names = dict(theirs=[theirs + name for name in rule.theirs], ours=[ours + name for name in rule.ours])
            return dataclasses.replace(rule, **{side: tuple(value) for side, value in names.items()})

        def buffer(buffer: Buffer) -> Buffer:
            return dataclasses.replace(buffer, theirs=theirs + buffer.theirs, like=ours + buffer.like)

        return Table(
            rules=tuple(map(rule, self.rules)),
            buffers=tuple(map(buffer, self.buffers)),
            renames=tuple(rename(*item) for item in self.renames),
            dropped=tuple(re.escape(theirs) + pattern for pattern in self.dropped),
        )


# Shorthands for the layers every table is made of.
def same(theirs: str, ours: str) -> tuple[Rule, ...]:
    """One array, equal on both sides."""
    return (Rule((theirs,), (ours,)),)


def _weight_and_bias(layout: Layout, theirs: str, ours: str, bias: bool) -> tuple[Rule, ...]:
    weight = Rule((f"{theirs}.weight",), (f"{ours}.kernel",), layout)
    return (weight, *same(f"{theirs}.bias", f"{ours}.bias")) if bias else (weight,)


def linear(theirs: str, ours: str, bias: bool = True) -> tuple[Rule, ...]:
    """A linear layer."""
    return _weight_and_bias(LINEAR, theirs, ours, bias)


def conv(theirs: str, ours: str, bias: bool = False) -> tuple[Rule, ...]:
    """A convolution."""
    return _weight_and_bias(CONV, theirs, ours, bias)


def pointwise(theirs: str, ours: str, bias: bool = False) -> tuple[Rule, ...]:
    """A 1x1 convolution that is a linear layer on our side."""
    return _weight_and_bias(POINTWISE, theirs, ours, bias)


def norm(theirs: str, ours: str) -> tuple[Rule, ...]:
    """LayerNorm or GroupNorm."""
    return same(f"{theirs}.weight", f"{ours}.scale") + same(f"{theirs}.bias", f"{ours}.bias")


def frozen_batch_norm(theirs: str, ours: str) -> tuple[Rule, ...]:
    """Batch normalisation with its statistics."""
    return (
        *norm(theirs, ours),
        *same(f"{theirs}.running_mean", f"{ours}.mean"),
        *same(f"{theirs}.running_var", f"{ours}.var"),
    )


def batch_norm_counter(theirs: str, ours: str) -> Buffer:
    """Batch normalisation's counter of training steps, which frozen statistics do not need."""
    return Buffer(f"{theirs}.num_batches_tracked", f"{ours}.var", lambda _: np.zeros((), np.int64), checked=False)


def packed_attention(theirs: str, ours: str) -> tuple[Rule, ...]:
    """`torch.nn.MultiheadAttention` <-> separate projections."""
    parts = [f"{ours}.{name}" for name in ("query", "key", "value")]
    return (
        Rule((f"{theirs}.in_proj_weight",), tuple(f"{part}.kernel" for part in parts), SPLIT_LINEAR),
        Rule((f"{theirs}.in_proj_bias",), tuple(f"{part}.bias" for part in parts), SPLIT_VECTOR),
        *linear(f"{theirs}.out_proj", f"{ours}.out"),
    )


def joined_qkv(theirs: Sequence[str], ours: str) -> tuple[Rule, ...]:
    """Three projections of theirs <-> one packed projection of ours."""
    return (
        Rule(tuple(f"{name}.weight" for name in theirs), (f"{ours}.kernel",), JOIN_LINEAR),
        Rule(tuple(f"{name}.bias" for name in theirs), (f"{ours}.bias",), JOIN_VECTOR),
    )


def stacked(rules: Iterable[Rule], index: str = "i") -> tuple[Rule, ...]:
    """The same rules for layers that we keep in one array with a leading layer axis."""
    return tuple(dataclasses.replace(rule, stacked=index) for rule in rules)


# Matching names against templates.
@functools.cache
def _compile(template: str) -> tuple[re.Pattern, tuple[tuple[str, int, int], ...]]:
    """Pattern with one group per index, and (name, scale, shift) of each."""
    pieces, indices, end = [], [], 0
    for match in _INDEX.finditer(template):
        pieces.append(re.escape(template[end : match.start()]) + r"(\d+)")
        indices.append((match[1], int(match[2] or 1), int(match[3] or 0)))
        end = match.end()
    pieces.append(re.escape(template[end:]))
    return re.compile("".join(pieces)), tuple(indices)


def match(template: str, name: str) -> dict[str, int] | None:
    """Values of the template's indices in `name`, or None when it does not fit."""
    pattern, indices = _compile(template)
    found = pattern.fullmatch(name)
    if found is None:
        return None
    values: dict[str, int] = {}
    for (index, scale, shift), text in zip(indices, found.groups(), strict=True):
        value, rest = divmod(int(text) - shift, scale)
        if rest or value < 0 or values.setdefault(index, value) != value:
            return None
    return values


def fill(template: str, values: Mapping[str, int]) -> str:
    """The name that a template gives for values of its indices."""
    return _INDEX.sub(lambda m: str(values[m[1]] * int(m[2] or 1) + int(m[3] or 0)), template)


class Index:
    """Finds the rule that a name belongs to, for one side of a table.

    Templates are bucketed by their text with the digits removed, so that a lookup tries only a few of them.
    """

    def __init__(self, templates: Iterable[tuple[str, Any]]):
        self._buckets: dict[str, list[tuple[str, Any]]] = {}
        for template, item in templates:
            self._buckets.setdefault(_skeleton(_INDEX.sub("0", template)), []).append((template, item))

    def find(self, name: str) -> tuple[Any, dict[str, int]] | None:
        """(item, index values) of the first template that fits."""
        for template, item in self._buckets.get(_skeleton(name), ()):
            values = match(template, name)
            if values is not None:
                return item, values
        return None


def _skeleton(name: str) -> str:
    return re.sub(r"\d+", "0", name)
