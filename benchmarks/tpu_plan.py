"""Compiles training steps and inference for TPU slices, without a TPU, and prints what they need per chip.

    python benchmarks/tpu_plan.py train cropformer_swin_l --topology=v5e:4x4 --batch=16
    python benchmarks/tpu_plan.py infer cropformer_swin_l --topology=v5e:2x2
    python benchmarks/tpu_plan.py train gella_vicuna_7b --topology=v5p:4x4x4 --batch=64
    python benchmarks/tpu_plan.py train gella_vicuna_7b --argument=lora --topology=v5e:8x8 --batch=64
    python benchmarks/tpu_plan.py decode gella_vicuna_7b --topology=v5e:2x2

Needs libtpu (pip install 'esg_jax[tpu]'), several GB of memory and minutes; results are in docs/tpu.md.
"""

import argparse
import dataclasses
import importlib
import os
import sys
from pathlib import Path

# Before jax is imported: plan on the host, and do not look for a TPU machine's metadata server.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from esg_jax.train.config import RunConfig  # noqa: E402
from esg_jax.train.plan import plan_decoding, plan_inference, plan_training  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "infer", "decode"])
    parser.add_argument("config", help="name of a file in configs/")
    parser.add_argument("--argument", help="of the config, as behind its colon in train.py")
    parser.add_argument("--model-axis", type=int, default=1, help="size of the mesh axis that splits matrices")
    parser.add_argument("--topology", default="v5e:4x4", help="slice to compile for; inference uses one of its chips")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1344), help="padded height and width of a view")
    parser.add_argument("--batch", type=int, help="images per step over all chips (default: the config's)")
    parser.add_argument("--views", type=int, default=5, help="views per image at inference")
    parser.add_argument("--no-remat", action="store_true", help="keep all activations for the backward pass")
    arguments = parser.parse_args()

    given = [arguments.argument] if arguments.argument else []
    config = importlib.import_module(f"configs.{arguments.config}").get_config(*given)
    run = RunConfig.from_dict(config.to_dict())
    height, width = arguments.size
    if arguments.what == "decode":
        plan = plan_decoding(run.model.llm, arguments.topology)
    elif arguments.what == "infer":
        plan = plan_inference(run.model, arguments.topology, height, width, views=arguments.views)
    else:
        batch = arguments.batch or run.data.batch_size
        run = dataclasses.replace(
            run,
            data=dataclasses.replace(run.data, batch_size=batch),
            mesh=dataclasses.replace(run.mesh, model=arguments.model_axis),
            remat=not arguments.no_remat,
        )
        plan = plan_training(run, arguments.topology, height, width)
    size = f" at {height}x{width}" if arguments.config.startswith(("cropformer", "mask2former")) else ""
    print(f"{arguments.what} {arguments.config}{size}, {run.precision}: {plan}")


if __name__ == "__main__":
    main()
