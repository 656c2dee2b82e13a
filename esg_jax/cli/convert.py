"""`esg convert`: checkpoints from PyTorch and to PyTorch."""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

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
        choices=("ours", "reference", "transformers", "original"),
        help="what to write; default: ours from a PyTorch source; from weights of ours, the reference's names of "
        "CropFormer, transformers' of LLaVA, LLaMA and CLIP. original: LLaVA's own names",
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
    import jax.numpy as jnp

    from esg_jax import weights
    from esg_jax.interop import checkpoints
    from esg_jax.interop.readers import open_checkpoint
    from esg_jax.models.cropformer import CropFormerConfig

    config = None
    if args.config:
        try:
            config, _ = weights.config_from_dict(json.loads(args.config.read_text()), args.config.name)
        except json.JSONDecodeError as error:
            raise ValueError(f"{args.config} is not JSON: {error}") from error
    ours = weights.is_weights_file(args.source)
    stored = weights.read_info(args.source)[0] if ours else None
    language = ours and not isinstance(stored, CropFormerConfig)
    target_format = args.format or ("transformers" if language else "reference" if ours else "ours")
    if args.verify and target_format == "ours":
        raise ValueError("--verify compares with PyTorch, so it needs --format reference or transformers")
    if target_format == "ours" and args.target.suffix != ".safetensors":
        raise ValueError(f"{args.target}: weights of ours end in .safetensors")
    if ours and target_format == "ours":
        raise ValueError(f"{args.source} holds weights of ours already; choose --format reference or transformers")
    if language and getattr(stored, "lora", None) is None:
        options = dict(vocab_size=args.vocab_size, leave_out=args.allow_unused)
        for path in checkpoints.save_language(
            args.target, open_checkpoint(args.source), stored, target_format, **options
        ):
            print(f"wrote {path}")
        return _verify(args, weights.load_model(args.source)) if args.verify else OK
    if args.vocab_size is not None and not language:
        raise ValueError("--vocab-size is for language models in weights of ours")
    options = dict(config=config, num_heads=args.num_heads, allow_unused=args.allow_unused, vision=args.vision)
    if target_format == "ours" and not args.allow_missing:
        report = checkpoints.convert_to_file(args.source, args.target, dtype=jnp.dtype(args.dtype), **options)
        print(f"{args.target}: {report}")
        return OK
    if ours:
        model = weights.load_model(args.source)
    else:
        model, report = checkpoints.load_checkpoint(args.source, allow_missing=args.allow_missing, **options)
        print(f"{args.source}: {report}")
    if target_format == "ours":
        weights.save_weights(args.target, model, {"source": args.source.name}, dtype=jnp.dtype(args.dtype))
        print(f"wrote {args.target}")
        return OK
    for path in checkpoints.save_checkpoint(args.target, model, target_format):
        print(f"wrote {path}")
    return _verify(args, model) if args.verify else OK


def _verify(args: argparse.Namespace, model) -> int:
    from esg_jax.interop.verify import verify_gella, verify_language, verify_reference, verify_transformers
    from esg_jax.models.cropformer import CropFormer
    from esg_jax.models.gella import Gella

    if isinstance(model, Gella):
        run_both = verify_gella
    elif not isinstance(model, CropFormer):
        run_both = verify_language
    else:
        run_both = verify_transformers if args.target.is_dir() else verify_reference
    try:
        differences = run_both(args.target, model)
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
