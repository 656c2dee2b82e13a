"""Compiled inference as a file: StableHLO for several platforms, with the weights and golden outputs beside it.

A folder holds ``program.zip`` (one `jax.export` module per platform), ``weights.safetensors`` (arguments of the
program, by name), ``golden.npz`` (an input and the outputs it must give) and ``program.json`` (what goes in and comes
out). Running it needs jax and safetensors, not this package; `docs/conversion.md` has the loader.
"""

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save_file as save_safetensors

from esg_jax.config import to_dict
from esg_jax.systems import system_of
from esg_jax.version import __version__
from esg_jax.weights import named_arrays

PLATFORMS = ("cpu", "cuda", "tpu")
_FILES = ("program.zip", "weights.safetensors", "golden.npz", "program.json")


def export_program(
    folder: str | Path,
    model: nnx.Module,
    *,
    height: int,
    width: int,
    views: int | None = None,
    batch: int = 1,
    platforms: Sequence[str] = PLATFORMS,
) -> None:
    """Writes the inference of `model` for one padded size.

    The program maps (weights, image uint8 (B, T, H, W, 3), size int32 (B, T, 2)) to ``class_logits`` (B, Q, K+1) and
    ``mask_logits`` (B, Q, T, H/4, W/4), both float32: the batch level with several views, else the image level.

    Args:
        folder: target; its files are replaced only when all are complete.
        model: with arrays fully addressable from this process.
        height, width: padded size of the views in pixels, multiples of 32.
        views: T; by default 5 with view association, always 1 without.
        batch: B.
        platforms: any of cpu, cuda, tpu.

    Raises:
        ValueError: not a CropFormer, an unknown platform, a size that is no multiple of 32, or views of a model without
            association.
    """
    views = system_of(model.config).views(model.config, views)
    unknown = set(platforms) - set(PLATFORMS)
    if unknown:
        raise ValueError(f"unknown platform {sorted(unknown)[0]!r}; choose from {', '.join(PLATFORMS)}")
    if height % 32 or width % 32 or height < 32 or width < 32:
        raise ValueError(f"{height}x{width}: both sides must be positive multiples of 32")
    weights = {name: np.asarray(jax.device_get(value)) for name, value in named_arrays(model).items()}
    run = _inference(model)
    abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}
    image = jax.ShapeDtypeStruct((batch, views, height, width, 3), jnp.uint8)
    size = jax.ShapeDtypeStruct((batch, views, 2), jnp.int32)
    # One module per platform: a common one would lower the TPU's Pallas kernels for CPUs as well, which JAX refuses.
    modules = {
        platform: jax.export.export(jax.jit(run), platforms=[platform])(abstract, image, size).serialize()
        for platform in platforms
    }

    golden = _golden_input(image.shape)
    outputs = jax.jit(run)(weights, golden["image"], golden["size"])
    description = {
        "esg_jax": __version__,
        "jax": jax.__version__,
        "platforms": list(platforms),
        "model": to_dict(model.config),
        "inputs": {"image": [list(image.shape), "uint8"], "size": [list(size.shape), "int32"]},
        "outputs": {name: [list(x.shape), str(x.dtype)] for name, x in outputs.items()},
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    partial = {name: folder / f"{name}.partial" for name in _FILES}
    try:
        with zipfile.ZipFile(partial["program.zip"], "w", zipfile.ZIP_DEFLATED) as archive:
            for platform, module in modules.items():
                archive.writestr(platform, bytes(module))
        save_safetensors(weights, partial["weights.safetensors"])
        with partial["golden.npz"].open("wb") as file:
            np.savez_compressed(file, **golden, **{name: np.asarray(x) for name, x in outputs.items()})
        partial["program.json"].write_text(json.dumps(description, indent=2) + "\n")
        for name in _FILES:
            partial[name].replace(folder / name)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


def _inference(model: nnx.Module):
    """Inference as a function of a flat dictionary of weights, which `jax.export` can serialise."""
    graph, state = nnx.split(model)
    variables = dict(nnx.to_flat_state(state))
    system = system_of(model.config)

    def run(weights: dict[str, jax.Array], image, size) -> dict[str, jax.Array]:
        flat = {path: variable.replace(weights[".".join(map(str, path))]) for path, variable in variables.items()}
        return system.outputs(nnx.merge(graph, nnx.from_flat_state(flat)), image, size)

    return run


def _golden_input(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Smooth noise; the last view is smaller than the padded size."""
    batch, views, height, width, _ = shape
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (batch, views, height // 16, width // 16, 3), np.uint8)
    image = coarse.repeat(16, axis=2).repeat(16, axis=3)
    size = np.full((batch, views, 2), (height, width), np.int32)
    size[:, -1] -= (5, 9)
    return {"image": image, "size": size}


def check_program(folder: str | Path) -> dict[str, float]:
    """Runs an exported program on this machine and compares with its golden outputs.

    Returns:
        Output name -> largest absolute difference.

    Raises:
        FileNotFoundError: a file of the folder is missing.
        ValueError: a file is corrupt, or the program was not exported for this platform.
    """
    folder = Path(folder)
    for name in _FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no exported program: {name} is missing")
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    try:
        with zipfile.ZipFile(folder / "program.zip") as archive:
            platforms = archive.namelist()
            module = archive.read(platform) if platform in platforms else None
        weights = load_file(folder / "weights.safetensors")
        golden = dict(np.load(folder / "golden.npz"))
    except (zipfile.BadZipFile, SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{folder} holds a corrupt file: {error}") from error
    if module is None:
        raise ValueError(f"{folder} was exported for {', '.join(platforms)}, this machine is {platform}")
    exported = jax.export.deserialize(bytearray(module))
    outputs: dict[str, Any] = exported.call(weights, golden["image"], golden["size"])
    return {name: float(np.abs(np.asarray(x) - golden[name]).max()) for name, x in outputs.items()}
