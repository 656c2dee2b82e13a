"""Runs PyTorch's model and ours on the same input (needs the `torch` extra)."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from esg_jax.config import to_dict
from esg_jax.models.clip import Clip, ClipText, ClipVision
from esg_jax.models.cropformer import CropFormer
from esg_jax.models.gella import Gella
from esg_jax.models.llama import Llama
from esg_jax.models.llava import Llava

_SIZE = 256


@dataclasses.dataclass(frozen=True)
class Difference:
    """Largest difference of one output, absolute and relative to its largest magnitude."""

    output: str
    absolute: float
    relative: float


def verify_transformers(
    folder: str | Path, model: CropFormer, size: tuple[int, int] = (_SIZE, _SIZE)
) -> list[Difference]:
    """Compares `model` with transformers' Mask2Former loaded from `folder`, in float32 on a random image.

    Args:
        folder: holds config.json and model.safetensors.
        model: ours, without views.
        size: height and width of the image. Below the size at which every Swin stage holds a whole window
            transformers shrinks the windows and rightly differs.

    Raises:
        ModuleNotFoundError: torch or transformers is not installed.
        ValueError: transformers did not find all weights in the folder.
    """
    import torch
    from transformers import Mask2FormerForUniversalSegmentation

    theirs, info = Mask2FormerForUniversalSegmentation.from_pretrained(
        str(folder), local_files_only=True, output_loading_info=True, dtype=torch.float32
    )
    _nothing_lost(folder, info)
    image, extent = _random_views(1, size)
    output = _run(model, image, extent)
    normalized = np.asarray(model.normalize(jnp.asarray(image), jnp.asarray(extent)))[0]
    with torch.inference_mode():
        expected = theirs.eval()(pixel_values=torch.from_numpy(normalized.transpose(0, 3, 1, 2).copy()))
    return [
        _difference("class logits", output.image.logits[-1], expected.class_queries_logits),
        _difference("mask logits", output.image_mask_logits()[:, 0], expected.masks_queries_logits),
    ]


def verify_reference(path: str | Path, model: CropFormer, size: tuple[int, int] = (128, 160)) -> list[Difference]:
    """Compares `model` in float32 with the PyTorch network of `torch_cropformer` that loads `path`, on random views.

    PyTorch computes in float64. Its float32 GroupNorm takes the variance as a difference of means, which loses up to
    three digits where a channel varies little around a large mean; ours does not, and should not be charged for it.

    Args:
        path: a `.pth` or `.safetensors` file under the reference's names.
        model: ours; with view association two views are compared at the batch level.
        size: padded height and width of the views.

    Raises:
        ModuleNotFoundError: torch is not installed.
        RuntimeError: the file does not fit the network.
    """
    import torch

    from esg_jax.interop.torch_cropformer import CropFormer as Reference

    path = Path(path)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)["model"]
    theirs = Reference(to_dict(model.config)).eval()
    theirs.load_state_dict(state, strict=True)
    theirs.double()
    joint = model.config.association is not None
    image, extent = _random_views(2 if joint else 1, size)
    output = _run(model, image, extent)
    with torch.inference_mode():
        views = torch.from_numpy(image.transpose(0, 1, 4, 2, 3).copy()).double()
        logits, masks = theirs(views, torch.from_numpy(extent))
    if joint:
        ours = output.batch.logits[-1], output.batch_mask_logits()
    else:
        ours = output.image.logits[-1], output.image_mask_logits().swapaxes(1, 2)
    return [_difference("class logits", ours[0], logits), _difference("mask logits", ours[1], masks)]


def verify_language(folder: str | Path, model: nnx.Module) -> list[Difference]:
    """Compares a LLaVA, LLaMA or CLIP with transformers' model loaded from `folder`, in float32 on random input.

    Args:
        folder: holds config.json and safetensors.
        model: ours.

    Raises:
        ModuleNotFoundError: torch or transformers is not installed.
        ValueError: transformers did not find all weights in the folder, or has no such model.
    """
    import torch
    import transformers

    (name,) = json.loads((Path(folder) / "config.json").read_text())["architectures"]
    if not hasattr(transformers, name):
        raise ValueError(f"{name} is not a model of transformers, so there is nothing to compare with")
    theirs, info = getattr(transformers, name).from_pretrained(
        str(folder), local_files_only=True, output_loading_info=True, dtype=torch.float32
    )
    _nothing_lost(folder, info)
    rng = np.random.default_rng(0)
    config = model.config
    vision = config if isinstance(model, ClipVision) else getattr(config, "vision", None)
    text = next((getattr(config, part) for part in ("llm", "text") if hasattr(config, part)), config)
    inputs, arguments = {}, []
    if vision is not None:
        image = rng.normal(size=(2, vision.image_size, vision.image_size, 3)).astype(np.float32)
        inputs["pixel_values"] = torch.from_numpy(image.transpose(0, 3, 1, 2).copy())
        arguments.append(image)
    if not isinstance(model, ClipVision):
        ids = rng.integers(3, min(text.vocab_size, 32000) - 1, (2, 8))
        if isinstance(model, Llava):
            places = np.full((2, vision.grid**2), config.image_id)
            ids = np.concatenate([ids[:, :3], places, ids[:, 3:]], axis=1)
        elif not isinstance(model, Llama):
            ids[:, -1] = text.eos_id
        inputs["input_ids"] = torch.from_numpy(ids)
        arguments.append(ids)
    with torch.inference_mode():
        expected = theirs.eval()(**inputs)
    run, output = {
        Llava: (Llava.__call__, "logits"),
        Llama: (lambda model, ids: model.logits(model(model.embed(ids))[0]), "logits"),
        Clip: (Clip.__call__, "logits_per_image"),
        ClipVision: (ClipVision.pooled, "pooler_output"),
        ClipText: (lambda model, ids: model(ids)[0], "last_hidden_state"),
    }[type(model)]
    differences = [_difference(output, nnx.jit(run)(model, *arguments), getattr(expected, output))]
    if isinstance(model, ClipText) and config.projection_dim is not None:
        differences.append(_difference("text_embeds", model(*arguments)[1], expected.text_embeds))
    return differences


def verify_gella(folder: str | Path, model: Gella) -> list[Difference]:
    """Compares a GELLA with the PyTorch network of `torch_gella` that loads `folder`, in float32 on random input.

    Args:
        folder: what `save_gella` wrote.
        model: ours.

    Raises:
        ModuleNotFoundError: torch or transformers is not installed.
        ValueError, RuntimeError: the folder does not fit the network.
    """
    import torch

    from esg_jax.interop.torch_gella import load

    theirs = load(folder)
    config, rng = model.config, np.random.default_rng(0)
    side = config.image_size
    image = rng.integers(0, 256, (2, side, side, 3), np.uint8)
    size = np.array([[side, side], [side, side // 2]], np.int32)
    colors = rng.integers(0, 256, (2, 4, 4, 3)).astype(np.float32)
    colormap = colors.repeat(config.colormap.size // 4, 1).repeat(config.colormap.size // 4, 2)
    tensors = [torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for x in (image, colormap)]

    def ours(model, image, size, colormap, ids, seg_pos):
        vision = model.vision_tokens(image, size)
        output = model.visual.entity_encoder(vision, colormap, all_predictions=False)
        found = (output.masks.image.logits[-1], output.masks.image_mask_logits()[:, 0], output.embed)
        if ids is None:
            return found
        hidden = model.text(vision, ids)
        return *found, hidden, model.associate(model.noun_states(hidden, seg_pos), output.embed)

    names = ["entityness logits", "mask logits", "entity embeddings"]
    ids = seg_pos = None
    if config.llm is not None:
        names += ["text states", "association logits"]
        places = np.full((2, config.grid**2), config.image_id, np.int32)
        words = rng.integers(3, min(config.image_id, config.llm.vocab_size), (2, 12)).astype(np.int32)
        words[:, [5, 9]] = config.seg_id
        ids = np.concatenate([words[:, :3], places, words[:, 3:]], axis=1)
        seg_pos = np.tile(np.array([5, 9], np.int32) + places.shape[1], (2, 1))
    with torch.inference_mode():
        vision = theirs.vision_tokens(tensors[0], torch.from_numpy(size))
        if ids is None:
            expected = theirs.entities(vision, tensors[1])
        else:
            inputs = (tensors[0], torch.from_numpy(size), tensors[1], torch.from_numpy(ids).long())
            association, found = theirs(*inputs, torch.from_numpy(seg_pos).long())
            expected = (*found, theirs.text(vision, inputs[3]), association)
    results = nnx.jit(ours)(model, image, size, colormap, ids, seg_pos)
    return [_difference(*items) for items in zip(names, results, expected, strict=True)]


def _nothing_lost(folder: str | Path, info: dict) -> None:
    lost = {key: info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    if lost:
        raise ValueError(f"transformers does not take {folder} as it is: {lost}")


def _random_views(views: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    image = np.random.default_rng(0).integers(0, 256, (1, views, *size, 3), np.uint8)
    return image, np.broadcast_to(np.array(size, np.int32), (1, views, 2)).copy()


def _run(model: CropFormer, image: np.ndarray, size: np.ndarray):
    return nnx.jit(lambda model, image, size: model(image, size, all_predictions=False))(model, image, size)


def _difference(name: str, ours, theirs) -> Difference:
    ours, theirs = np.asarray(ours, np.float64), theirs.double().numpy()
    if ours.shape != theirs.shape:
        raise ValueError(f"{name}: our shape is {ours.shape}, theirs {theirs.shape}")
    absolute = np.abs(ours - theirs).max()
    return Difference(name, float(absolute), float(absolute / np.abs(theirs).max()))
