"""The program starts again with its arguments, once, and never against the user's own settings."""

import ast
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import esg_jax
from esg_jax import cli
from esg_jax.cli import __main__ as esg

ROOT = Path(esg_jax.__file__).parent

_PROGRAM = """
import os, sys
from esg_jax.allocator import keep_memory
print("started", os.getpid())
keep_memory()
print(sys.argv[1], os.environ.get("GLIBC_TUNABLES"))
"""


def lines(**variables):
    env = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"} | variables
    command = [sys.executable, "-c", _PROGRAM, "an argument"]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_starts_again_once_as_the_same_process():
    first, second, last = lines()
    assert first == second
    assert last.startswith("an argument glibc.malloc.")


def test_keeps_what_the_user_set():
    assert lines(GLIBC_TUNABLES="glibc.malloc.arena_max=2")[1:] == ["an argument glibc.malloc.arena_max=2"]


@pytest.mark.parametrize("program", ["train", "evaluation"])
def test_programs_begin_with_it(program):
    """Before any import that takes seconds, and only as a program."""
    _, first, *_ = ast.parse((ROOT / program / "__main__.py").read_text()).body
    assert ast.unparse(first) == (
        "if __name__ == '__main__':\n    from esg_jax.allocator import keep_memory\n    keep_memory()"
    )


def test_the_command_does_so_unless_it_is_called(monkeypatch, capsys):
    started = []
    monkeypatch.setattr("esg_jax.cli.__main__.keep_memory", lambda: started.append(True))
    monkeypatch.setattr(sys, "argv", ["esg", "--version"])
    for call in (cli.main, esg.main):
        with pytest.raises(SystemExit):
            call()
    assert started == [True] and capsys.readouterr().out.count("esg_jax ") == 2
