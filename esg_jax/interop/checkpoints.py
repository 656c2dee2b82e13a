"""Whole checkpoints: PyTorch files to models and back."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from esg_jax.config import from_dict, to_dict
from esg_jax.interop.convert import (
    ConversionError,
    Report,
    load_into,
    stream_from_ours,
    stream_to_ours,
    targets_of,
)
from esg_jax.interop.cropformer_tables import reference_table, transformers_table
from esg_jax.interop.formats import Format, detect, infer_config, our_shapes
from esg_jax.interop.readers import CheckpointReader, open_checkpoint
from esg_jax.interop.transformers_config import mask2former_config, read_mask2former_config
from esg_jax.interop.writers import write_pth, write_safetensors
from esg_jax.models.backbones.mobilenet_v2 import MobileNetV2, MobileNetV2Config
from esg_jax.models.backbones.resnet import ResNet, ResNetConfig
from esg_jax.models.backbones.swin import Swin, SwinConfig
from esg_jax.models.cropformer import CropFormer, CropFormerConfig
from esg_jax.weights import file_metadata

CONFIG_KEY = "esg_jax_config"
_BACKBONES = {SwinConfig: Swin, ResNetConfig: ResNet, MobileNetV2Config: MobileNetV2}


def config_of(reader: CheckpointReader, found: Format, num_heads: int | None = None) -> CropFormerConfig:
    """The model configuration of a whole checkpoint: stored by us, from config.json beside it, or from its shapes."""
    if CONFIG_KEY in reader.metadata:
        return from_dict(CropFormerConfig, json.loads(reader.metadata[CONFIG_KEY]), "model")
    folder_config = reader.path.parent / "config.json"
    if "transformers" in found.name and folder_config.is_file():
        return read_mask2former_config(folder_config)
    return infer_config(our_shapes(reader, found.table), num_heads)


def load_checkpoint(
    source: str | Path | CheckpointReader,
    *,
    config: CropFormerConfig | None = None,
    num_heads: int | None = None,
    allow_missing: str | None = None,
    allow_unused: str | None = None,
    shardings: Mapping[str, Any] | None = None,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    seed: int = 0,
) -> tuple[CropFormer, Report]:
    """A CropFormer or Mask2Former with the weights of a PyTorch checkpoint.

    Args:
        source: file, index or folder (see `open_checkpoint`), or a reader that is open already.
        config: the model to build; by default the one the checkpoint describes.
        num_heads: attention heads, when neither the checkpoint nor 8 is right.
        allow_missing: regular expression of our parameters that keep their random initialisation, for example
            ``^association`` to start CropFormer from a Mask2Former.
        allow_unused: regular expression of their tensors that are ignored.
        shardings: our name -> sharding; parameters go straight to their devices, one at a time.
        dtype, param_dtype: of the computation and of the parameters.
        seed: of the parameters that `allow_missing` leaves at random.

    Raises:
        FileNotFoundError: no such file.
        ConversionError: the checkpoint holds no whole model, or names or shapes do not fit.
    """
    reader = source if isinstance(source, CheckpointReader) else open_checkpoint(source)
    found = _whole(reader)
    config = config or config_of(reader, found, num_heads)

    def create():
        return CropFormer(config, rngs=nnx.Rngs(seed), dtype=dtype, param_dtype=param_dtype)

    report = Report()
    model = create() if allow_missing else nnx.eval_shape(create)
    arrays = stream_to_ours(
        reader,
        targets_of(model),
        found.table,
        allow_missing=allow_missing,
        allow_unused=allow_unused,
        report=report,
    )
    return load_into(model, _placed(arrays, shardings)), report


def convert_to_file(
    source: str | Path,
    target: str | Path,
    *,
    config: CropFormerConfig | None = None,
    num_heads: int | None = None,
    allow_unused: str | None = None,
    dtype=np.float32,
) -> Report:
    """Converts a PyTorch checkpoint to a weights file of ours, one tensor at a time.

    Args:
        source, config, num_heads, allow_unused: as for `load_checkpoint`.
        target: the `.safetensors` file to write; it appears only when complete.
        dtype: of the stored floating-point arrays.

    Raises:
        FileNotFoundError: no such file.
        ConversionError: the checkpoint holds no whole model, or names or shapes do not fit.
    """
    reader = open_checkpoint(source)
    found = _whole(reader)
    config = config or config_of(reader, found, num_heads)
    targets = targets_of(nnx.eval_shape(lambda: CropFormer(config, rngs=nnx.Rngs(0))))
    report = Report()
    arrays = stream_to_ours(reader, targets, found.table, allow_unused=allow_unused, report=report)
    layout = {name: (x.shape, np.dtype(dtype)) for name, x in targets.items()}
    write_safetensors(target, layout, arrays, file_metadata(config, {"source": Path(source).name}))
    return report


def _whole(reader: CheckpointReader) -> Format:
    found = detect(list(reader))
    if not found.whole:
        raise ConversionError(f"{reader.path} holds only a backbone ({found.name})")
    return found


def _placed(arrays: Iterator[tuple[str, np.ndarray]], shardings: Mapping[str, Any] | None):
    for name, array in arrays:
        yield name, jax.device_put(array, shardings[name]) if shardings else array


def load_backbone(
    backbone: nnx.Module, path: str | Path, *, allow_unused: str | None = None
) -> tuple[nnx.Module, Report]:
    """The backbone with pretrained weights from `path`, any of the backbone formats.

    Norms of the four outputs, which classifiers do not have, keep their values.

    Raises:
        FileNotFoundError: no such file.
        ConversionError: another architecture, or names or shapes that do not fit.
    """
    reader = open_checkpoint(path)
    found = detect(list(reader))
    expected = _BACKBONES[found.backbone]
    if found.whole or not isinstance(backbone, expected):
        raise ConversionError(f"{path} is a checkpoint of {found.name}, not of a {type(backbone).__name__} backbone")
    report = Report()
    arrays = stream_to_ours(
        reader,
        targets_of(backbone),
        found.table,
        allow_missing=found.absent,
        allow_unused=allow_unused,
        report=report,
    )
    return load_into(backbone, arrays), report


def save_checkpoint(path: str | Path, model: CropFormer, format: str = "reference") -> list[Path]:
    """Writes a model for PyTorch.

    Args:
        path: for ``reference`` a file, whose ending (.pth or .safetensors) chooses the kind; for ``transformers`` a
            folder, which gets model.safetensors and config.json.
        model: with arrays fully addressable from this process.
        format: ``reference`` or ``transformers``.

    Returns:
        The files written.

    Raises:
        ValueError: an unknown format or ending, or a model the format has no place for.
    """
    path = Path(path)
    arrays = {name: np.asarray(jax.device_get(value)) for name, value in targets_of(model).items()}
    backbone = type(model.config.backbone)
    if format == "transformers":
        config = mask2former_config(model.config)
        tensors = dict(stream_from_ours(arrays, transformers_table(backbone)))
        path.mkdir(parents=True, exist_ok=True)
        # "pt" is what transformers insists on finding in the metadata.
        _write_safetensors(path / "model.safetensors", tensors, {"format": "pt"})
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        return [path / "model.safetensors", path / "config.json"]
    if format != "reference":
        raise ValueError(f"unknown format {format!r}; choose reference or transformers")
    table = reference_table(backbone, association=model.config.association is not None, reading=False)
    metadata = {CONFIG_KEY: json.dumps(to_dict(model.config))}
    if path.suffix not in (".pth", ".safetensors"):
        raise ValueError(f"{path.name}: the ending must be .pth or .safetensors")
    tensors = dict(stream_from_ours(arrays, table))
    if path.suffix == ".pth":
        write_pth(path, tensors.items(), metadata)
    else:
        _write_safetensors(path, tensors, {"format": "pt", **metadata})
    return [path]


def _write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    layout = {name: (array.shape, array.dtype) for name, array in tensors.items()}
    write_safetensors(path, layout, tensors.items(), metadata)
