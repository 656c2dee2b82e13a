"""`esg export`: compiled inference as a file."""

import argparse
from pathlib import Path

from esg_jax.cli import OK
from esg_jax.cli.convert import report_differences

DESCRIPTION = "Compiled inference (StableHLO for CPU, CUDA and TPU in one file) with weights and golden outputs."
EXAMPLES = """\
examples:
  esg export weights.safetensors program/ --height 832 --width 1344
  esg export --check program/                             (runs it here, compares with the golden outputs)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint, for which sizes and platforms; or which folder to check."""
    add = parser.add_argument
    add("checkpoint", type=Path, nargs="?", help="weights of ours or any PyTorch checkpoint that converts")
    add("folder", type=Path, help="folder to write, or to check")
    add("--height", type=int, default=832, help="padded height of the views, a multiple of 32 (default: 832)")
    add("--width", type=int, default=1344, help="padded width of the views, a multiple of 32 (default: 1344)")
    add("--views", type=int, help="views per image; default: 5 with view association, else 1")
    add("--batch-size", type=int, default=1, help="images per call (default: 1)")
    add("--platforms", default="cpu,cuda,tpu", help="comma-separated (default: cpu,cuda,tpu)")
    add("--check", action="store_true", help="run an exported program here and compare with its golden outputs")
    add("--tolerance", type=float, default=1e-4, help="largest absolute difference --check accepts (default: 1e-4)")


def run(args: argparse.Namespace) -> int:
    """Writes or checks; returns the exit status."""
    from esg_jax.interop.program import check_program, export_program

    if args.check:
        return report_differences(check_program(args.folder), args.tolerance)
    if args.checkpoint is None:
        raise ValueError("name a checkpoint and a folder (or --check FOLDER)")
    import esg_jax

    export_program(
        args.folder,
        esg_jax.load(args.checkpoint),
        height=args.height,
        width=args.width,
        views=args.views,
        batch=args.batch_size,
        platforms=args.platforms.split(","),
    )
    print(f"wrote {args.folder}; `esg export --check {args.folder}` runs it")
    return OK
