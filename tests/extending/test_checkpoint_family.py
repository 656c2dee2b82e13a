"""A checkpoint family that lives outside the package: a table, sizes, a writer and one entry."""

import json

import numpy as np
import pytest
from flax import nnx

import esg_jax
from esg_jax import cli
from esg_jax.interop import families
from esg_jax.interop.checkpoints import load_part, save_checkpoint
from esg_jax.interop.convert import ConversionError, targets_of
from esg_jax.interop.families.family import Family, Format, folder_writer
from esg_jax.interop.families.llama import infer_llama, with_vocabulary
from esg_jax.interop.rules import LINEAR, Rule, Table, linear, same, stacked
from esg_jax.models.language.llama import Llama, LlamaConfig
from esg_jax.weights import save_weights

# What its author writes: names,
_LAYER = {
    "attn.q": "attention.query",
    "attn.k": "attention.key",
    "attn.v": "attention.value",
    "attn.o": "attention.out",
    "ffn.gate": "mlp.gate",
    "ffn.up": "mlp.up",
    "ffn.down": "mlp.down",
}
TABLE = Table(
    rules=(
        Rule(("tokens.weight",), ("embed.embedding",), growing=0),
        *stacked(
            rule
            for theirs, ours in _LAYER.items()
            for rule in linear(f"layer{{i+1}}.{theirs}", f"layers.{ours}", bias=False)
        ),
        *stacked(same("layer{i+1}.norm1", "layers.attention_norm.scale")),
        *stacked(same("layer{i+1}.norm2", "layers.mlp_norm.scale")),
        *same("norm", "norm.scale"),
        Rule(("output.weight",), ("head.kernel",), LINEAR, growing=1),
    )
)
# sizes, and the entry that holds them together.
FAMILY = Family(
    model=Llama,
    config=LlamaConfig,
    formats=lambda: (Format("toy language model", (r"^tokens\.weight", r"^layer1\.attn\.q"), TABLE),),
    infer=infer_llama,
    read_json=lambda values, where: LlamaConfig(**values["sizes"]),
    written_as="toy",
    write=folder_writer(lambda _: TABLE, lambda config: {"sizes": vars(config)}, rows=lambda config: config.vocab_size),
    with_vocabulary=with_vocabulary,
)
CONFIG = LlamaConfig(vocab_size=70, width=24, num_layers=3, num_heads=6, num_kv_heads=2, ffn_dim=40, max_length=64)


@pytest.fixture
def registered():
    families.FAMILIES.append(FAMILY)
    yield
    families.FAMILIES.remove(FAMILY)


@pytest.fixture(scope="module")
def model():
    return Llama(CONFIG, rngs=nnx.Rngs(0))


def run(*args):
    return cli.main([str(arg) for arg in args])


def assert_equal(model, wanted):
    for name, value in targets_of(wanted).items():
        np.testing.assert_array_equal(targets_of(model)[name], value, err_msg=name)


def test_it_is_read_and_written_like_the_others(registered, model, tmp_path):
    save_checkpoint(tmp_path / "theirs", model, "toy")
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["dtype"] == "float32"
    again = esg_jax.load(tmp_path / "theirs")
    assert again.config == CONFIG
    assert_equal(again, model)
    part, _ = load_part(nnx.eval_shape(lambda: Llama(CONFIG, rngs=nnx.Rngs(0))), tmp_path / "theirs")
    assert_equal(part, model)


def test_the_command_line_knows_it(registered, model, tmp_path, capsys):
    save_weights(tmp_path / "ours.safetensors", model)
    assert run("convert", tmp_path / "ours.safetensors", tmp_path / "theirs", "--format", "toy") == 0
    assert run("convert", tmp_path / "theirs", tmp_path / "back.safetensors") == 0
    assert_equal(esg_jax.load(tmp_path / "back.safetensors"), model)
    few = ("convert", tmp_path / "ours.safetensors", tmp_path / "few", "--format", "toy", "--vocab-size", 60)
    assert run(*few) == 0
    assert esg_jax.load(tmp_path / "few").config.vocab_size == 60
    capsys.readouterr()
    assert run(*few, "--verify") == 1
    assert "nothing to compare 'toy' with" in capsys.readouterr().err


def test_without_its_entry_it_is_unknown(model, tmp_path):
    with pytest.raises(ConversionError, match="no format 'toy' for a LlamaConfig; choose transformers"):
        save_checkpoint(tmp_path / "out", model, "toy")
    with pytest.raises(ConversionError, match="unknown checkpoint: its first names are tokens.weight"):
        families.detect(["tokens.weight", "layer1.attn.q.weight"])
    assert not list(tmp_path.iterdir())
