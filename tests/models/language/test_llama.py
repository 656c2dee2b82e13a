"""LLaMA against transformers with the same random weights, and what the reference does not cover."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esg_jax.models.language.llama import KVCache, Llama, LlamaConfig

TINY = LlamaConfig(vocab_size=61, width=32, num_layers=3, num_heads=4, num_kv_heads=4, ffn_dim=48)
VARIANTS = {
    "full attention": TINY,
    "grouped queries, tied": dataclasses.replace(TINY, num_kv_heads=2, tied=True, rope_base=100000.0),
    "one key head": dataclasses.replace(TINY, num_kv_heads=1, norm_eps=1e-6),
}
IDS = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 9))


@pytest.fixture(scope="module")
def model():
    return random_model(VARIANTS["grouped queries, tied"])


def random_model(config, **kwargs):
    """Weights of order one, so that no term of the network is negligible."""
    model = Llama(config, rngs=nnx.Rngs(0), **kwargs)
    rng = np.random.default_rng(1)
    state = jax.tree.map(lambda x: jnp.asarray(rng.normal(scale=0.3, size=x.shape), x.dtype), nnx.state(model))
    nnx.update(model, state)
    model.norm.scale[...] += 1
    return model


@jax.jit
def forward(model, ids):
    hidden, _ = model(model.embed(ids))
    return hidden, model.logits(hidden)


def full_logits(model, ids):
    return forward(model, ids)[1]


@pytest.mark.torch
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_matches_transformers(config):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = random_model(config)
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.ffn_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
            tie_word_embeddings=config.tied,
        )
    ).eval()
    reference.load_state_dict(torch_state(model), strict=not config.tied)
    with torch.no_grad():
        wanted = reference(torch.from_numpy(IDS), output_hidden_states=True)
    hidden, logits = forward(model, IDS)
    np.testing.assert_allclose(hidden, wanted.hidden_states[-1].numpy(), atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(logits, wanted.logits.numpy(), atol=1e-4, rtol=1e-4)


def torch_state(model):
    """Our weights under transformers' names."""
    import torch

    names = {
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.out": "self_attn.o_proj",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
    }
    top = {"embed.embedding": "model.embed_tokens", "norm.scale": "model.norm", "head.kernel": "lm_head"}
    state = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        *parts, leaf = path
        value = torch.from_numpy(np.array(variable[...]))
        value = value.mT if leaf == "kernel" else value
        if parts[0] == "layers":
            for index, layer in enumerate(value):
                state[f"model.layers.{index}.{names['.'.join(parts[1:])]}.weight"] = layer
        else:
            state[top[".".join(path)] + ".weight"] = value
    return state


def test_parameter_names():
    state = nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: Llama(TINY, rngs=nnx.Rngs(0)))))
    shapes = {".".join(path): variable.shape for path, variable in state}
    assert shapes == {
        "embed.embedding": (61, 32),
        "head.kernel": (32, 61),
        "norm.scale": (32,),
        "layers.attention_norm.scale": (3, 32),
        "layers.mlp_norm.scale": (3, 32),
        "layers.attention.query.kernel": (3, 32, 32),
        "layers.attention.key.kernel": (3, 32, 32),
        "layers.attention.value.kernel": (3, 32, 32),
        "layers.attention.out.kernel": (3, 32, 32),
        "layers.mlp.gate.kernel": (3, 32, 48),
        "layers.mlp.up.kernel": (3, 32, 48),
        "layers.mlp.down.kernel": (3, 48, 32),
    }


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (LlamaConfig.llama_7b(vocab_size=32000), 6738.4),
        (LlamaConfig.llama_13b(vocab_size=32000), 13015.9),
        (LlamaConfig.smollm2_135m(vocab_size=49152), 134.5),
    ],
)
def test_named_sizes_have_the_published_number_of_parameters(config, millions):
    leaves = jax.tree.leaves(nnx.eval_shape(lambda: nnx.state(Llama(config, rngs=nnx.Rngs(0)))))
    assert round(sum(leaf.size for leaf in leaves) / 1e6, 1) == millions


def test_cached_steps_equal_the_full_pass(model):
    """A right-padded prompt of different lengths, then one token at a time."""
    wanted = full_logits(model, IDS)
    prompt, lengths = 5, np.array([3, 5])

    @jax.jit
    def step(model, ids, cache):
        hidden, cache = model(model.embed(ids), cache=cache)
        return model.logits(hidden), cache

    got, cache = step(model, IDS[:, :prompt], KVCache.empty(model.config, 2, 9))
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(got[row, :length], wanted[row, :length], atol=1e-5)
    cache = dataclasses.replace(cache, lengths=jnp.asarray(lengths))
    for offset in range(4):
        got, cache = step(model, np.take_along_axis(IDS, lengths[:, None] + offset, axis=1), cache)
        np.testing.assert_allclose(got[:, 0], wanted[np.arange(2), lengths + offset], atol=1e-5)
    np.testing.assert_array_equal(cache.lengths, lengths + 4)


def test_padding_on_the_right_changes_nothing(model):
    padded = np.pad(IDS, ((0, 0), (0, 3)))
    np.testing.assert_allclose(full_logits(model, padded)[:, :9], full_logits(model, IDS), atol=1e-5)


def test_recomputation_changes_no_gradient():
    def gradient(model):
        return nnx.to_flat_state(nnx.state(jax.jit(jax.grad(lambda model: full_logits(model, IDS).std()))(model)))

    plain, recomputed = (gradient(random_model(TINY, remat=remat)) for remat in (False, True))
    for (path, value), (_, other) in zip(plain, recomputed, strict=True):
        assert np.abs(value[...]).max() > 0, path
        np.testing.assert_allclose(value[...], other[...], rtol=1e-5, atol=1e-6, err_msg=str(path))


def test_bfloat16_keeps_float32_logits():
    logits = full_logits(random_model(TINY, dtype=jnp.bfloat16), IDS)
    exact = full_logits(random_model(TINY), IDS)
    assert logits.dtype == jnp.float32
    assert np.corrcoef(logits.ravel(), exact.ravel())[0, 1] > 0.995


def test_the_first_blocks_alone(model):
    """They are a shorter model, final norm included."""
    short = random_model(dataclasses.replace(model.config, num_layers=2))
    graph, state = nnx.split(short)
    state["layers"] = jax.tree.map(lambda x: x[:2], nnx.state(model)["layers"])
    state["norm"], state["embed"] = (nnx.state(model)[name] for name in ("norm", "embed"))
    expected, _ = forward(nnx.merge(graph, state), IDS)
    found, cache = jax.jit(lambda model: model(model.embed(IDS), num_blocks=2))(model)
    assert cache is None and np.abs(found - forward(model, IDS)[0]).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_errors_name_the_sizes(model):
    with pytest.raises(ValueError, match="width .33."):
        LlamaConfig(width=33, num_heads=4)
    with pytest.raises(ValueError, match="num_kv_heads .3."):
        LlamaConfig(num_kv_heads=3)
    with pytest.raises(ValueError, match="9 tokens do not fit a cache of 8"):
        model(model.embed(IDS), cache=KVCache.empty(model.config, 2, 8))
    with pytest.raises(ValueError, match="run it without num_blocks"):
        model(model.embed(IDS), cache=KVCache.empty(model.config, 2, 16), num_blocks=1)
