"""`esg convert`: checkpoints from PyTorch and to PyTorch."""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esg_jax.cli import FAILED, OK

DESCRIPTION = """\
Checkpoints from PyTorch and to PyTorch. The source's format shows in its content: the reference code's CropFormer and
Mask2Former (.pth, .pkl, .safetensors), transformers' Mask2Former, LLaVA, LLaMA and CLIP (a folder, sharded or not),
LLaVA's own files, or weights of ours. Reading a .pth never runs code from it. Every tensor must find its place, or the
command fails and lists the names.
"""
EXAMPLES = """\
examples:
  esg convert CropFormer_swin_tiny_3x.pth cropformer_swin_t.safetensors
  esg convert mask2former/ weights.safetensors            (a folder of transformers)
  esg convert m2f.pth start.safetensors --config cropformer.json --allow-missing '^association'
  esg convert weights.safetensors model.pth --verify      (ours to the reference's names)
  esg convert weights.safetensors out/ --format transformers --verify
  esg convert llava-1.5-7b-hf/ llava.safetensors --dtype bfloat16
  esg convert llava-v1.5-7b/ llava.safetensors --vision clip-vit-large-patch14-336/     (LLaVA's own files lack CLIP)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is read, what is written, and what may differ."""
    add = parser.add_argument
    add("source", type=Path, help="checkpoint to read: a file, an index file or a folder")
    add("target", type=Path, help="checkpoint to write")
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


def run(args: argparse.Namespace) -> int:
    """Converts; returns the exit status."""
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
    return OK


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
        return OK
    try:
        differences = family.verify(args.target, model)
    except RuntimeError as error:  # PyTorch's words for a file that does not fit its network
        raise ValueError(f"{args.target}: {error}") from error
    lines = {item.output: f"{item.absolute:.2e}, relative {item.relative:.2e}" for item in differences}
    return report_differences({item.output: item.absolute for item in differences}, args.tolerance, lines)


def report_differences(
    differences: Mapping[str, float], tolerance: float, shown: Mapping[str, str] | None = None
) -> int:
    """Prints the largest absolute difference of every output; the exit status says whether all are small enough."""
    for name, difference in differences.items():
        print(f"{name}: max abs difference {shown[name] if shown else f'{difference:.2e}'}")
    if any(not difference <= tolerance for difference in differences.values()):
        print(f"error: above the tolerance of {tolerance:g}", file=sys.stderr)
        return FAILED
    return OK
