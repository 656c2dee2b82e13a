"""Runs whose weights are split over eight devices, evaluated where they are.

    python live_runs.py SYSTEM FOLDER PROCESS PORT      one of two processes with four devices each

Test support: `prepare` writes data, `evaluate_live` is what `train.py` does while training, `evaluate_file` what
`eval.py` does afterwards on one device.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from configs import tiny
from esg_jax.evaluation import main as evaluation
from esg_jax.evaluation.tasks import EntityTask, EvalTask, NarrativeTask
from esg_jax.inference.bundle import open_bundle
from esg_jax.input.grounding import GroundingDataConfig
from esg_jax.losses.gella import GellaLossConfig
from esg_jax.masks import rle
from esg_jax.models.cropformer.mask_decoder import MaskDecoderConfig
from esg_jax.models.cropformer.pixel_decoder import PixelDecoderConfig
from esg_jax.models.gella import GellaConfig
from esg_jax.models.gella.colormap import ColormapConfig
from esg_jax.models.gella.entity_encoder import EntityEncoderConfig
from esg_jax.models.gella.grounding_association import GroundingAssociationConfig
from esg_jax.models.gella.resoblend import ResoBlendConfig
from esg_jax.models.language.clip import ClipVisionConfig
from esg_jax.models.language.llama import LlamaConfig
from esg_jax.models.language.lora import LoraConfig
from esg_jax.sharding import LargestDim, format_rules, make_mesh
from esg_jax.train import main as train
from esg_jax.train.config import RunConfig, model_def
from esg_jax.train.logging import MetricWriter

# Every array that eight devices can divide is divided, so none of them is whole anywhere.
RULES = ((r"", LargestDim(min_size=1)),)
CAPTION = "a dog and two cats"
PHRASES = (("dog", (1,)), ("two cats", (2, 3)))


def prepare(folder: Path) -> None:
    """Three images of two sizes with three entities and a caption each, a tokenizer and wording."""
    tokenizers = __import__("tokenizers")
    rng = np.random.default_rng(0)
    images, annotations, captions = [], [], []
    for i, (height, width) in enumerate(((60, 80), (80, 60), (60, 80))):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{i}.png")
        labels = np.zeros((height, width), np.uint8)
        labels[:30], labels[30:, :30], labels[30:, 35:] = 1, 2, 3
        images.append({"id": i, "file_name": f"{i}.png", "height": height, "width": width})
        for number, code in enumerate(map(rle.to_json, rle.encode_labels(labels, 3)), start=1):
            annotations.append({"id": 10 * i + number, "image_id": i, "category_id": 1, "iscrowd": 0,
                                "area": int((labels == number).sum()), "segmentation": code})  # fmt: skip
        phrases = [
            {"text": text, "start": CAPTION.index(text), "end": CAPTION.index(text) + len(text),
             "plural": len(masks) > 1, "mask_ids": [10 * i + mask for mask in masks]}
            for text, masks in PHRASES
        ]  # fmt: skip
        captions.append({"id": i, "image_id": i, "caption": CAPTION, "phrases": phrases})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "entity"}]}
    (folder / "truth.json").write_text(json.dumps(content | {"captions": captions}))
    words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *(f"w{k}" for k in range(57))])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "prompts.yaml").write_text(
        "conversations: {vicuna: {system: ''}}\nquestions: {extraction: ['Nouns: {text}'], description: ['Tell me']}\n"
    )


def cropformer(folder: Path) -> tuple[RunConfig, EvalTask]:
    """A run and its evaluation."""
    config = RunConfig.from_dict(tiny.get_config(str(folder)).to_dict())
    return config, EntityTask(annotations=f"{folder}/truth.json", images=str(folder), grid_images=0)


def gella(folder: Path) -> tuple[RunConfig, EvalTask]:
    """The same for a GELLA, with its language model and adapters."""
    model = GellaConfig(
        entities=EntityEncoderConfig(
            cropformer(folder)[0].model.backbone,
            ResoBlendConfig(dim=32, num_heads=4, ffn_dim=48),
            PixelDecoderConfig(conv_dim=32, mask_dim=16, num_layers=1, num_heads=4, ffn_dim=48),
            MaskDecoderConfig(hidden_dim=32, mask_dim=16, num_heads=4, ffn_dim=48, num_layers=2, num_queries=8),
        ),
        vision=ClipVisionConfig.tiny(),
        image_size=32,
        colormap=ColormapConfig(size=64),
        llm=LlamaConfig(vocab_size=64, width=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=48, max_length=128),
        association=GroundingAssociationConfig(dim=16),
        lora=LoraConfig(rank=2),
        image_id=60,
        seg_id=62,
    )
    data = GroundingDataConfig(
        {"captions": {"captions": f"{folder}/truth.json", "images": str(folder)}},
        image_size=32,
        num_image_tokens=model.num_image_tokens,
        map_size=64,
        max_entities=model.num_queries,
        prompts=f"{folder}/prompts.yaml",
    )
    config = RunConfig(model, data, GellaLossConfig(), tokenizer=f"{folder}/tokenizer.json", precision="float32")
    where = dict(annotations=f"{folder}/truth.json", images=str(folder), captions=f"{folder}/truth.json")
    # Random weights find nothing again, so that every match counts.
    return config, NarrativeTask(reader="linked_captions", rules=("match_iou=0.0",), grid_images=0, **where)


SYSTEMS = {"cropformer": cropformer, "gella": gella}


def random_weights(config: RunConfig) -> dict[str, np.ndarray]:
    """Large enough for masks that vary over the image."""
    rng, out = np.random.default_rng(0), {}
    definition = model_def(config.model)
    for name, leaf in sorted({**definition.params, **definition.constants}.items()):
        scale = 1.5 / np.sqrt(leaf.shape[-2]) if len(leaf.shape) > 1 else 0.1
        out[name] = (rng.normal(0, scale, leaf.shape) + name.endswith("scale")).astype(leaf.dtype)
        if name.endswith("var"):
            out[name] = np.ones(leaf.shape, leaf.dtype)
    return out


def evaluate_live(system: str, folder: Path, out: Path, *, model_axis: int = 1):
    """What is logged, the state of the run, and its step; weights are split over all devices."""
    config, recipe = SYSTEMS[system](folder)
    config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, eval_every=1))
    if model_axis == 1:  # the default table splits matrices over the model axis
        config = dataclasses.replace(config, sharding=format_rules(RULES))
    step = config.train_step(mesh=make_mesh(1, -1, model_axis))
    state = step.init(random_weights(config))
    writer = MetricWriter(out)
    train.evaluate(config, recipe, step, out, writer, state)
    writer.close()
    return config, step, state


def evaluate_file(system: str, folder: Path, out: Path, weights: Path) -> dict:
    """Scores on one device."""
    _, recipe = SYSTEMS[system](folder)
    return evaluation.score(recipe, evaluation.predict(recipe, open_bundle(weights), out), out)["metrics"]


if __name__ == "__main__":
    system, folder, process, port = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(f"localhost:{port}", 2, int(process))
    assert len(jax.devices()) == 8 and len(jax.local_devices()) == 4
    evaluate_live(system, Path(folder), Path(folder) / f"hosts_{system}")
