"""Eight simulated CPU devices, float32 matmuls, and the location of the optional golden data."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

REPO = Path(__file__).resolve().parent.parent
# Programs are compiled once, also for several workers and for the next run.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPO / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")

import pytest  # noqa: E402

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
