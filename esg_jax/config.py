"""Frozen configuration dataclasses to and from plain dictionaries.

A `ConfigDict` in `configs/` holds the dictionary form, so that any field can be overridden on the command line
(`--config.model.mask_decoder.num_queries=200`); library code only ever sees the dataclasses.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")

# Tells the members of a union of dataclasses apart, e.g. which backbone a dictionary describes.
TYPE_KEY = "type"


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dictionary of a dataclass; every dataclass records its class name under ``type``."""
    out: dict[str, Any] = {TYPE_KEY: type(config).__name__}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        out[field.name] = to_dict(value) if dataclasses.is_dataclass(value) else value
    return out


def from_dict(cls: type[T], values: Mapping[str, Any], path: str = "config") -> T:
    """Builds the dataclass `cls` from `values`; fields left out keep their defaults.

    Args:
        cls: a dataclass type; its annotations may be dataclasses, or unions of dataclasses and None. `Annotated` with a
            function stands for the union of the dataclasses that the function returns, those of a registry.
        values: the mapping to read; a ``type`` key selects the member of a union.
        path: prefix for error messages.

    Raises:
        ValueError: an unknown key, a ``type`` that does not fit, or a value that an optional field does not take; named
            with its full path.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - names - {TYPE_KEY})
    if unknown:
        raise ValueError(f"unknown key {path}.{unknown[0]}; {cls.__name__} has {', '.join(sorted(names))}")
    given = values.get(TYPE_KEY, cls.__name__)
    if given != cls.__name__:
        raise ValueError(f"{path}.{TYPE_KEY} is {given!r}, expected {cls.__name__!r}")
    kwargs = {}
    for name in names & set(values):
        kwargs[name] = _read_field(hints[name], values[name], f"{path}.{name}")
    return cls(**kwargs)


def _read_field(hint: Any, value: Any, path: str) -> Any:
    if isinstance(value, Mapping):
        members = _dataclass_members(hint)
        if not members:
            return dict(value)
        by_name = {member.__name__: member for member in members}
        name = value.get(TYPE_KEY, members[0].__name__ if len(members) == 1 else None)
        if name not in by_name:
            raise ValueError(f"{path}.{TYPE_KEY} is {name!r}; choose one of {', '.join(sorted(by_name))}")
        return from_dict(by_name[name], value, path)
    if isinstance(value, list):
        return tuple(value)  # JSON and ConfigDict have no tuples; frozen configs hold nothing mutable
    _check_optional(hint, value, path)
    return value


def _check_optional(hint: Any, value: Any, path: str) -> None:
    """Refuses a value of another type in a field that may be None: there the command line takes anything."""
    options = typing.get_args(hint)
    if type(None) not in options or not all(isinstance(option, type) for option in options):
        return
    members = _dataclass_members(hint)
    plain = [option for option in options if option not in members]
    fits = isinstance(value, (*plain, int) if float in plain else tuple(plain))
    if not fits or (isinstance(value, bool) and bool not in plain):
        names = " or ".join("None" if option is type(None) else option.__name__ for option in options)
        raise ValueError(f"{path} is {value!r}; expected {names}")


def _dataclass_members(hint: Any) -> list[type]:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return [member for option in typing.get_args(hint) for member in _dataclass_members(option)]
    if typing.get_origin(hint) is typing.Annotated:
        return list(hint.__metadata__[0]())
    return [hint] if dataclasses.is_dataclass(hint) else []
