"""The `esg` command. Every subcommand is a file of this folder over library functions, imported only when used.

A command is a module with

    DESCRIPTION, EXAMPLES           texts for its --help; EXAMPLES may be empty
    add_arguments(parser)           its arguments
    run(args) -> exit status        what it does; a ValueError, OSError or ImportError becomes one line on stderr

and an entry in `COMMANDS`.
"""

import argparse
import importlib
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from esg_jax import __version__

# name -> (module, one line of help)
COMMANDS = {
    "predict": ("esg_jax.cli.predict", "entity masks of an image or a folder"),
    "ground": ("esg_jax.cli.ground", "which masks a text speaks of"),
    "evaluate": ("esg_jax.cli.evaluate", "score saved predictions with the papers' metrics"),
    "convert": ("esg_jax.cli.convert", "checkpoints from PyTorch and to PyTorch"),
    "export": ("esg_jax.cli.export", "compiled inference as a file that needs only jax"),
}
OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `esg ARGV`; returns the exit status: 0 done, 1 something failed, 2 wrong use, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = make_parser(argv[0] if argv else "").parse_args(argv)
    _keep_compiled_programs()
    try:
        return args.run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"esg {argv[0]}: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def make_parser(chosen: str) -> argparse.ArgumentParser:
    """The parser; only the subcommand `chosen` is imported and complete, the others are a line of help."""
    parser = argparse.ArgumentParser(
        prog="esg",
        description="Entity segmentation and grounding in JAX.",
        epilog="`esg COMMAND --help` explains a command, with examples.",
    )
    parser.add_argument("--version", action="version", version=f"esg_jax {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (module, text) in COMMANDS.items():
        if name != chosen:
            subparsers.add_parser(name, help=text)
            continue
        command = importlib.import_module(module)
        about = dict(description=command.DESCRIPTION, epilog=command.EXAMPLES)
        style = argparse.RawDescriptionHelpFormatter
        subparser = subparsers.add_parser(name, help=text, formatter_class=style, **about)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def _keep_compiled_programs() -> None:
    """Lets JAX keep compiled programs between runs, unless the environment says where (or "" for nowhere)."""
    # One folder per machine: programs for one CPU may not run on another that shares the home directory.
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "esg_jax" / platform.node()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")
