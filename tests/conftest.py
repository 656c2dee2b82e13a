"""Eight simulated CPU devices, float32 matmuls, and the location of the optional golden data."""

import copy
import dataclasses
import importlib.metadata
import os
import re
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
_FLAGS = ["--xla_force_host_platform_device_count=8"]
# The suite compiles more than it runs: this halves the time of small programs. Later versions have one emitter only.
_FLAGS.append("--xla_backend_optimization_level=1")
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
for flag in _FLAGS:
    if flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"

REPO = Path(__file__).resolve().parent.parent
# Programs are compiled once, also for several workers and for the next run.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPO / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from flax import nnx  # noqa: E402

from esg_jax.inference.grounding.decisions import GroundingConfig  # noqa: E402
from esg_jax.inference.grounding.grounder import Grounder  # noqa: E402
from esg_jax.masks import disjoint_masks, read_masks  # noqa: E402
from esg_jax.models.backbones.swin import SwinConfig  # noqa: E402
from esg_jax.models.cropformer import CropFormer, CropFormerConfig  # noqa: E402
from esg_jax.models.cropformer.mask_decoder import MaskDecoderConfig  # noqa: E402
from esg_jax.models.cropformer.pixel_decoder import PixelDecoderConfig  # noqa: E402
from esg_jax.models.cropformer.view_association import AssociationConfig  # noqa: E402
from esg_jax.models.gella import Gella  # noqa: E402
from esg_jax.text.prompts import Prompts  # noqa: E402
from esg_jax.weights import save_weights  # noqa: E402

SHARED = Path(os.environ.get("ESG_SHARED", REPO.parent / "shared"))


def shared_path(*parts: str) -> Path:
    """Path below the golden-data folder; skips the calling test when a user's clone lacks it."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"golden data {path} is not part of the repository")
    return path


@pytest.fixture(scope="session")
def shared():
    """`shared("fixtures", "cropformer", "x.npz")` -> Path, or skip."""
    return shared_path


@pytest.fixture(scope="session")
def smollm2_path():
    """The packaged language model's file, or skip."""
    from esg_jax.interop.gguf import packaged_smollm2

    for package in ("gguf", "tokenizers"):
        pytest.importorskip(package)
    try:
        return packaged_smollm2()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def reference_model():
    """`reference_model(golden)` -> our model with the PyTorch parameters of a golden file, through the converter."""
    from esg_jax.interop.checkpoints import load_checkpoint
    from esg_jax.interop.readers import reader_of

    def load(golden):
        names = (name for name in golden.files if name.startswith("param/"))
        state = {name.removeprefix("param/"): golden[name] for name in names}
        model, report = load_checkpoint(reader_of(state))
        assert not (report.missing or report.ignored or report.dropped)
        return model

    return load


@pytest.fixture(scope="session")
def tiny_gella_config():
    """A GELLA of a hundred thousand weights."""
    from esg_jax.models.backbones.mobilenet_v2 import MobileNetV2Config
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

    return GellaConfig(
        entities=EntityEncoderConfig(
            MobileNetV2Config(train_affine=True),
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


TINY = CropFormerConfig(
    backbone=SwinConfig(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=4),
    pixel_decoder=PixelDecoderConfig(conv_dim=32, mask_dim=32, num_layers=1, num_heads=8, ffn_dim=32),
    mask_decoder=MaskDecoderConfig(hidden_dim=32, mask_dim=32, num_heads=8, ffn_dim=32, num_layers=1, num_queries=7),
    association=AssociationConfig(num_heads=8, ffn_dim=32),
)


def build(config, model=CropFormer):
    """A model with random weights, large enough for masks that vary over the image; nothing is compiled for it."""
    rng = np.random.default_rng(0)
    graph, state = nnx.split(nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0))))
    flat = dict(nnx.to_flat_state(state))
    for path, variable in flat.items():
        shape = variable.get_value().shape
        values = rng.normal(0, 1.5 / np.sqrt(shape[0]) if len(shape) > 1 else 0.1, shape) + (path[-1] == "scale")
        flat[path] = variable.replace(jnp.asarray(values, jnp.float32))
    return nnx.merge(graph, nnx.from_flat_state(flat))


@pytest.fixture(scope="session")
def random_model():
    """`random_model(config, module)`."""
    return build


@pytest.fixture(scope="session")
def tiny_model():
    """A CropFormer with seven queries."""
    return build(TINY)


@pytest.fixture(scope="session")
def tiny_class_model():
    """A plain Mask2Former with three classes."""
    return build(TINY.without_views(num_classes=3))


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_model, tmp_path_factory):
    """The CropFormer as a file that asks for small views."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(path, tiny_model, {"inference": {"min_size": 64, "max_size": 96}})
    return path


class WordTokenizer:
    """A fixed id per word or sign; unknown words share ids, so decoding gives some word of that id."""

    bos_id, eos_id, pad_id, image_id, seg_id, vocab_size = 1, 2, 61, 60, 62, 63

    def __init__(self):
        self.words = {}

    def encode(self, text):
        ids = []
        for word in re.findall(r" ?\w+|.", text):
            token = 3 + sum(word.encode()) % 56
            self.words.setdefault(token, word)
            ids.append(token)
        return ids

    def decode(self, ids):
        return "".join(self.words.get(int(token), " ?") for token in ids)


@pytest.fixture(scope="session")
def word_tokenizer():
    """For the tiny GELLA."""
    return WordTokenizer()


@pytest.fixture(scope="session")
def short_prompts(tmp_path_factory):
    """Wording that fits into 128 tokens."""
    file = tmp_path_factory.mktemp("prompts") / "short.yaml"
    file.write_text(
        "conversations: {vicuna: {system: ''}}\nquestions: {extraction: ['Nouns: {text}'], description: ['Tell me']}\n"
    )
    return Prompts.load(file)


@pytest.fixture(scope="session")
def tiny_gella(tiny_gella_config):
    """A GELLA with random weights; Swin is its colormap encoder, which compiles fastest."""
    entities = dataclasses.replace(tiny_gella_config.entities, colormap_encoder=TINY.backbone)
    return build(dataclasses.replace(tiny_gella_config, entities=entities), Gella)


@pytest.fixture(scope="session")
def reconstructing_grounder(tiny_gella, short_prompts, word_tokenizer):
    """Two images at a time, two colourings, the model's own masks."""
    # Random weights reconstruct nothing, so every match counts.
    config = GroundingConfig(match_iou=0.0, output_masks="reconstructed", colorings=2)
    return Grounder(tiny_gella, word_tokenizer, short_prompts, config, batch_size=2, max_new_tokens=6)


@pytest.fixture(scope="session")
def grounder(reconstructing_grounder):
    """The same compiled programs with the given masks as output."""
    other = copy.copy(reconstructing_grounder)
    other.config = dataclasses.replace(other.config, output_masks="input")
    return other


@pytest.fixture(scope="session")
def pictures():
    """Three images of different shapes with three entities each."""
    rng = np.random.default_rng(0)
    images, masks = [], []
    for height, width in ((40, 60), (60, 40), (30, 30)):
        images.append(rng.integers(0, 256, (height, width, 3), np.uint8))
        labels = np.zeros((height, width), np.int32)
        labels[: height // 2], labels[height // 2 :, : width // 2], labels[height // 2 :, width // 2 + 3 :] = 5, 9, 2
        masks.append(disjoint_masks(read_masks(labels, (height, width))))
    return images, masks
