"""`esg convert` and `esg export`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

_CONVERT_HELP = """\
Checkpoints from PyTorch and to PyTorch. The source's format shows in its content: the reference code's CropFormer and
Mask2Former (.pth, .pkl, .safetensors), transformers' Mask2Former, LLaVA, LLaMA and CLIP (a folder, sharded or not),
LLaVA's own files, or weights of ours. Reading a .pth never runs code from it. Every tensor must find its place, or the
command fails and lists the names.
"""
_CONVERT_EXAMPLES = """\
examples:
  esg convert CropFormer_swin_tiny_3x.pth cropformer_swin_t.safetensors
  esg convert mask2former/ weights.safetensors            (a folder of transformers)
  esg convert m2f.pth start.safetensors --config cropformer.json --allow-missing '^association'
  esg convert weights.safetensors model.pth --verify      (ours to the reference's names)
  esg convert weights.safetensors out/ --format transformers --verify
  esg convert llava-1.5-7b-hf/ llava.safetensors --dtype bfloat16
  esg convert llava-v1.5-7b/ llava.safetensors --vision clip-vit-large-patch14-336/     (LLaVA's own files lack CLIP)
"""
_EXPORT_EXAMPLES = """\
examples:
  esg export weights.safetensors program/ --height 832 --width 1344
  esg export --check program/                             (runs it here, compares with the golden outputs)
"""


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    """Adds the subcommands."""
    convert = _parser(subparsers, "convert", _CONVERT_HELP, _CONVERT_EXAMPLES)
    convert.add_argument("source", type=Path, help="checkpoint to read: a file, an index file or a folder")
    convert.add_argument("target", type=Path, help="checkpoint to write")
    add = convert.add_argument
    add(
        "--format",
        metavar="NAME",
        help="what to write: ours (default from a PyTorch source), or for PyTorch reference (CropFormer's own code), "
        "transformers, original (LLaVA's own repository); default from weights of ours: the first that the model has",
    )
    add("--config", type=Path, metavar="JSON", help="the model to build, as a nested dictionary; default: inferred")
    add("--num-heads", type=int, metavar="N", help="attention heads of the decoders, which shapes do not show (8)")
    add("--allow-missing", metavar="REGEX", help="our parameters that may stay without a source (random values)")
    add("--allow-unused", metavar="REGEX", help="source tensors that may be left out")
    add(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="of weights of ours (default: float32)",
    )
    add("--vision", type=Path, metavar="PATH", help="CLIP's checkpoint, when LLaVA's own files are read")
    add("--vocab-size", type=int, metavar="N", help="rows of a language model to write (LLaVA's own files: 32000)")
    add("--verify", action="store_true", help="run PyTorch's model and ours on one input (needs the torch extra)")
    add("--tolerance", type=float, default=1e-4, help="largest absolute difference --verify accepts (default: 1e-4)")
    convert.set_defaults(run=run_convert)

    export = _parser(
        subparsers,
        "export",
        "Compiled inference (StableHLO for CPU, CUDA and TPU in one file) with weights and golden outputs.",
        _EXPORT_EXAMPLES,
    )
    add = export.add_argument
    add("checkpoint", type=Path, nargs="?", help="weights of ours or any PyTorch checkpoint that converts")
    add("folder", type=Path, help="folder to write, or to check")
    add("--height", type=int, default=832, help="padded height of the views, a multiple of 32 (default: 832)")
    add("--width", type=int, default=1344, help="padded width of the views, a multiple of 32 (default: 1344)")
    add("--views", type=int, help="views per image; default: 5 with view association, else 1")
    add("--batch-size", type=int, default=1, help="images per call (default: 1)")
    add("--platforms", default="cpu,cuda,tpu", help="comma-separated (default: cpu,cuda,tpu)")
    add("--check", action="store_true", help="run an exported program here and compare with its golden outputs")
    add("--tolerance", type=float, default=1e-4, help="largest absolute difference --check accepts (default: 1e-4)")
    export.set_defaults(run=run_export)


def _parser(subparsers, name: str, description: str, examples: str) -> argparse.ArgumentParser:
    return subparsers.add_parser(
        name, description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def run_convert(args: argparse.Namespace) -> int:
    """Runs `esg convert`; returns the exit status."""
    try:
        return _convert(args)
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _convert(args: argparse.Namespace) -> int:
    from esg_jax import weights

    config = None
    if args.config:
        try:
            config, _ = weights.config_from_dict(json.loads(args.config.read_text()), args.config.name)
        except json.JSONDecodeError as error:
            raise ValueError(f"{args.config} is not JSON: {error}") from error
    ours = weights.is_weights_file(args.source)
    if ours and args.format == "ours":
        raise ValueError(f"{args.source} holds weights of ours already; choose the --format to write")
    options = dict(config=config, num_heads=args.num_heads, allow_unused=args.allow_unused, vision=args.vision)
    if not ours and args.format in (None, "ours"):
        return _to_ours(args, options)
    return _to_pytorch(args, None if ours else options)


def _to_ours(args: argparse.Namespace, options: dict[str, Any]) -> int:
    import jax.numpy as jnp

    from esg_jax.interop import checkpoints
    from esg_jax.weights import save_weights

    if args.verify:
        raise ValueError("--verify compares with PyTorch, so it needs another --format than ours")
    if args.target.suffix != ".safetensors":
        raise ValueError(f"{args.target}: weights of ours end in .safetensors")
    if args.vocab_size is not None:
        raise ValueError("--vocab-size is for writing PyTorch's checkpoints; ours have all rows")
    dtype = jnp.dtype(args.dtype)
    if args.allow_missing:
        model, report = checkpoints.load_checkpoint(args.source, allow_missing=args.allow_missing, **options)
        save_weights(args.target, model, {"source": args.source.name}, dtype=dtype)
    else:
        report = checkpoints.convert_to_file(args.source, args.target, dtype=dtype, **options)
    print(f"{args.target}: {report}")
    return 0


def _to_pytorch(args: argparse.Namespace, options: dict[str, Any] | None) -> int:
    """`options` for a source of PyTorch's, None for weights of ours."""
    import esg_jax
    from esg_jax.interop import checkpoints
    from esg_jax.interop.families import written_family
    from esg_jax.interop.readers import open_checkpoint
    from esg_jax.weights import read_info

    arrays = model = None
    if options is not None:
        model, report = checkpoints.load_checkpoint(args.source, allow_missing=args.allow_missing, **options)
        print(f"{args.source}: {report}")
    else:
        arrays, config = open_checkpoint(args.source), read_info(args.source)[0]
        if args.verify or arrays.metadata.get("left_out"):  # what is left out comes from elsewhere
            model = esg_jax.load(args.source)
    if model is not None:
        arrays, config = checkpoints.host_arrays(model), model.config
    family = written_family(config, args.format)
    if args.verify and family.verify is None:
        raise ValueError(f"there is nothing to compare {family.written_as!r} with; leave --verify out")
    leave_out = args.allow_unused if options is None else None
    for path in checkpoints.save_arrays(
        args.target, arrays, config, args.format, vocab_size=args.vocab_size, leave_out=leave_out
    ):
        print(f"wrote {path}")
    if not args.verify:
        return 0
    differences = family.verify(args.target, model)
    for item in differences:
        print(f"{item.output}: max abs difference {item.absolute:.2e}, relative {item.relative:.2e}")
    if any(not item.absolute <= args.tolerance for item in differences):
        print(f"error: above the tolerance of {args.tolerance:g}", file=sys.stderr)
        return 1
    return 0


def run_export(args: argparse.Namespace) -> int:
    """Runs `esg export`; returns the exit status."""
    from esg_jax.interop.program import check_program, export_program

    try:
        if args.check:
            differences = check_program(args.folder)
            for name, difference in differences.items():
                print(f"{name}: max abs difference {difference:.2e}")
            if any(not difference <= args.tolerance for difference in differences.values()):
                print(f"error: above the tolerance of {args.tolerance:g}", file=sys.stderr)
                return 1
            return 0
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
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.folder}; `esg export --check {args.folder}` runs it")
    return 0
