"""int8 kernels: exact integers, bounded error, the same model in every other respect."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esg_jax.inference.grounding.decoding import DecodingConfig, generate
from esg_jax.interop.convert import load_into
from esg_jax.models.language.llama import Llama, LlamaConfig
from esg_jax.models.language.lora import Lora, LoraConfig, merge
from esg_jax.models.language.quantized import Int8Projection, memory_bytes, quantize, quantize_arrays
from esg_jax.ops.int8 import int8_matmul, quantize_int8
from esg_jax.weights import named_arrays

TINY = LlamaConfig(vocab_size=31, width=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=40)
IDS = np.random.default_rng(0).integers(0, 31, (2, 7))


@pytest.fixture(scope="module")
def model():
    model = Llama(TINY, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    nnx.update(
        model, jax.tree.map(lambda x: jnp.asarray(rng.normal(scale=0.3, size=x.shape), x.dtype), nnx.state(model))
    )
    return model


@jax.jit
def logits(model):
    return model.logits(model(model.embed(IDS))[0])


def rounded(model):
    """The float model whose kernels are the integers times their scales."""
    exact = nnx.clone(model)
    for path, variable in nnx.to_flat_state(nnx.state(exact)):
        if path[-1] == "kernel":
            integers, scale = quantize_int8(variable[...])
            variable[...] = integers * scale[..., None, :]
            nnx.update(exact, nnx.from_flat_state([(path, variable)]))
    return exact


@pytest.mark.parametrize("xp", [np, jnp])
def test_rounding_is_symmetric_and_within_half_a_scale(xp):
    kernel = xp.asarray(np.random.default_rng(2).normal(size=(3, 50, 7)).astype(np.float32))
    kernel = kernel * (xp.arange(7) != 4)
    integers, scale = quantize_int8(kernel)
    assert isinstance(integers, np.ndarray) == (xp is np)
    assert integers.dtype == xp.int8 and scale.dtype == xp.float32 and scale.shape == (3, 7)
    np.testing.assert_array_equal(np.abs(integers).max(axis=1), np.where(np.arange(7) == 4, 0, [[127]] * 3))
    error = np.abs(integers * scale[:, None] - kernel)
    assert (error <= scale[:, None] * 0.5 * (1 + 1e-5)).all()
    np.testing.assert_array_equal(quantize_int8(-kernel)[0], -integers)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_product_equals_that_of_the_dequantised_kernel(dtype):
    rng = np.random.default_rng(3)
    # Values that bfloat16 holds exactly: the only rounding left is float32's.
    x = rng.integers(-8, 9, (5, 64)).astype(np.float32)
    integers, scale = quantize_int8(rng.normal(size=(64, 9)).astype(np.float32))
    got = int8_matmul(x, integers, scale, dtype=dtype)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, x @ (integers * scale), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_quantised_model_equals_the_model_with_rounded_kernels(model, tied):
    if tied:
        model = Llama(dataclasses.replace(TINY, tied=True), rngs=nnx.Rngs(0))
    small = quantize(model)
    np.testing.assert_allclose(logits(small), logits(rounded(model)), atol=1e-4, rtol=1e-4)
    dtypes = {name: str(value.dtype) for name, value in named_arrays(small).items()}
    kernels = [name for name in dtypes if name.endswith("kernel")]
    assert len(kernels) == (7 if tied else 8) and all(dtypes[name] == "int8" for name in kernels)
    assert all(dtypes[name] == "float32" for name in dtypes if name not in kernels)
    assert not any(isinstance(v, nnx.Param) for path, v in nnx.to_flat_state(nnx.state(small)) if path[-1] == "kernel")


def test_quantising_keeps_the_original_and_the_predictions(model):
    before = logits(model)
    after = logits(quantize(model))
    np.testing.assert_array_equal(logits(model), before)
    assert np.corrcoef(np.ravel(before), np.ravel(after))[0, 1] > 0.999
    assert np.abs(before - after).max() > 0


def test_streamed_arrays_fill_the_abstract_model(model):
    abstract = nnx.eval_shape(lambda: quantize(Llama(TINY, rngs=nnx.Rngs(0))))
    arrays = ((name, np.asarray(value)) for name, value in named_arrays(model).items())
    np.testing.assert_allclose(logits(load_into(abstract, quantize_arrays(arrays))), logits(quantize(model)), atol=1e-5)


def test_generation_and_adapters_work_on_int8(model):
    small = quantize(model)
    config = DecodingConfig(eos_id=99, pad_id=0, max_new_tokens=5)
    lora = Lora(LoraConfig(rank=2), TINY, rngs=nnx.Rngs(4))
    run = jax.jit(generate, static_argnames="config")
    out = run(small, small.embed(IDS), np.array([7, 4]), config, lora=lora)
    wanted = run(rounded(model), small.embed(IDS), np.array([7, 4]), config)
    np.testing.assert_array_equal(out.ids, wanted.ids)
    assert isinstance(small.head, Int8Projection)
    with pytest.raises(ValueError, match="query kernel is int8: merge adapters before"):
        merge(small, lora)


def test_memory_of_the_7b_model():
    config = LlamaConfig.llama_7b()
    full = memory_bytes(config, int8=False, length=2048)
    small = memory_bytes(config, int8=True, length=2048)
    embedding = 32064 * 4096
    kernels = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + embedding
    norms = 65 * 4096
    scales = 32 * (5 * 4096 + 2 * 11008) + 32064
    assert full == {"weights": 2 * (kernels + embedding + norms), "cache": 2 * 2 * 32 * 2048 * 4096}
    assert small == {"weights": kernels + 4 * scales + 2 * (embedding + norms), "cache": full["cache"]}
    assert small["weights"] < 6.9e9 and full["weights"] > 13.4e9


def test_generation_with_7b_int8_lowers_for_tpu():
    """A chip of 16 GB: the program must not hold the kernels in another type."""
    config = LlamaConfig.llama_7b()

    def build():
        return quantize(Llama(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16))

    x = jax.ShapeDtypeStruct((1, 1024, config.width), jnp.bfloat16)
    settings = DecodingConfig(eos_id=2, pad_id=32001, seg_id=32002, vocab_size=32003)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    traced = jax.jit(generate, static_argnames="config").trace(nnx.eval_shape(build), x, lengths, settings)
    program = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "tensor<32x4096x11008xi8>" in program
    assert "tensor<32x4096x11008xbf16>" not in program and "tensor<32x4096x11008xf32>" not in program
