"""The `esg` command. Every subcommand lives beside the library code it calls, and is imported only when used."""

import argparse
import importlib
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from esg_jax import __version__

# name -> (module with `add_parsers(subparsers)`, one line of help). Modules may offer several names.
COMMANDS = {
    "predict": ("esg_jax.inference.commands", "entity masks of an image or a folder"),
    "ground": ("esg_jax.inference.ground_commands", "which masks a text speaks of"),
    "convert": ("esg_jax.interop.commands", "checkpoints from PyTorch and to PyTorch"),
    "export": ("esg_jax.interop.commands", "compiled inference as a file that needs only jax"),
    "evaluate": ("esg_jax.evaluation.commands", "score saved predictions with the papers' metrics"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `esg ARGV`; returns the exit status: 0 done, 1 something failed, 2 wrong use, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = make_parser(argv[0] if argv else "").parse_args(argv)
    _keep_compiled_programs()
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def make_parser(chosen: str) -> argparse.ArgumentParser:
    """The parser; only the subcommand `chosen` is imported and complete, the others are a line of help."""
    parser = argparse.ArgumentParser(
        prog="esg",
        description="Entity segmentation and grounding in JAX.",
        epilog="`esg COMMAND --help` explains a command, with examples.",
    )
    parser.add_argument("--version", action="version", version=f"esg_jax {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    module = COMMANDS.get(chosen, (None,))[0]
    if module:
        importlib.import_module(module).add_parsers(subparsers)
    for name, (other, text) in COMMANDS.items():
        if other != module:
            subparsers.add_parser(name, help=text)
    return parser


def _keep_compiled_programs() -> None:
    """Lets JAX keep compiled programs between runs, unless the environment says where (or "" for nowhere)."""
    # One folder per machine: programs for one CPU may not run on another that shares the home directory.
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "esg_jax" / platform.node()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")


if __name__ == "__main__":
    sys.exit(main())
