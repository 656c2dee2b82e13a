"""The program starts again with its arguments, once, and never against the user's own settings."""

import os
import platform
import subprocess
import sys

import pytest

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
