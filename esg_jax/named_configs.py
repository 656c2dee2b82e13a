"""Configurations by name, wherever `configs` is: in this folder, or installed beside the package."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path


def find_config(text: str) -> str:
    """The file of a configuration, with its argument.

    Args:
        text: FILE or NAME, as in ``configs/tiny.py``, ``tiny`` or ``recipes/entity_mini``, and behind a colon what is
            passed to its ``get_config``.

    Returns:
        The text with the path of an existing file; unchanged where there is none.
    """
    name, colon, argument = text.partition(":")
    if Path(name).is_file():
        return text
    spec = importlib.util.find_spec("configs")
    inside = name.removeprefix("configs/").removesuffix(".py") + ".py"
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if Path(folder, inside).is_file():
            return f"{Path(folder, inside)}{colon}{argument}"
    return text


def with_files(argv: Sequence[str], *names: str) -> list[str]:
    """A command line whose flags of these names have the files that `find_config` gives."""
    out = list(argv)
    for index, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if flag.lstrip("-") not in names or not flag.startswith("-"):
            continue
        if equals:
            out[index] = f"{flag}={find_config(value)}"
        elif index + 1 < len(argv):
            out[index + 1] = find_config(argv[index + 1])
    return out
