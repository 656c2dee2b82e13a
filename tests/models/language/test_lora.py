"""Low-rank adapters: no effect at the start, equal to merged kernels, gradients to the adapters alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esg_jax.models.language.llama import KVCache, Llama, LlamaConfig
from esg_jax.models.language.lora import Lora, LoraConfig, merge, unmerge

TINY = LlamaConfig(vocab_size=31, width=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=40)
ALL = ("query", "key", "value", "out", "gate", "up", "down")
IDS = np.random.default_rng(0).integers(0, 31, (2, 7))


@pytest.fixture(scope="module")
def model():
    model = Llama(TINY, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    nnx.update(
        model, jax.tree.map(lambda x: jnp.asarray(rng.normal(scale=0.3, size=x.shape), x.dtype), nnx.state(model))
    )
    return model


def trained(targets=ALL, **options):
    """Adapters as after training: `up` is not zero."""
    lora = Lora(LoraConfig(targets=targets, rank=3, **options), TINY, rngs=nnx.Rngs(1))
    rng = np.random.default_rng(2)
    for adapter in lora.adapters.values():
        adapter.up[...] = jnp.asarray(rng.normal(scale=0.2, size=adapter.up.shape), jnp.float32)
    return lora


@jax.jit
def logits(model, lora=None, key=None):
    return model.logits(model(model.embed(IDS), lora=lora, lora_key=key)[0])


def test_new_adapters_change_nothing(model):
    lora = Lora(LoraConfig(), TINY, rngs=nnx.Rngs(1))
    assert set(lora.adapters) == {"query", "value"}
    assert lora.adapters["query"].factor == 2
    np.testing.assert_array_equal(logits(model, lora), logits(model))


def test_merged_kernels_give_the_same_function(model):
    lora = trained()
    wanted = logits(model, lora)
    assert np.abs(wanted - logits(model)).max() > 0.1
    merged = merge(model, lora)
    np.testing.assert_allclose(logits(merged), wanted, atol=1e-4)
    restored = unmerge(merged, lora)
    for name in ("query", "key", "value", "out"):
        before, after = (getattr(m.layers.attention, name).kernel[...] for m in (model, restored))
        np.testing.assert_allclose(after, before, atol=1e-6)
    np.testing.assert_allclose(logits(restored), logits(model), atol=1e-5)


def test_adapters_work_with_the_cache(model):
    lora = trained(("value", "gate"))

    @jax.jit
    def in_two_parts(model, lora):
        hidden, cache = model(model.embed(IDS[:, :4]), cache=KVCache.empty(TINY, 2, 7), lora=lora)
        rest, _ = model(model.embed(IDS[:, 4:]), cache=cache, lora=lora)
        return model.logits(jnp.concatenate([hidden, rest], axis=1))

    np.testing.assert_allclose(in_two_parts(model, lora), logits(model, lora), atol=1e-5)


def test_gradient_reaches_every_adapter_and_the_base_can_stay_frozen(model):
    lora = trained()
    gradient = jax.jit(jax.grad(lambda lora: jnp.std(logits(model, lora))))(lora)
    for path, value in nnx.to_flat_state(nnx.state(gradient)):
        per_layer = np.abs(value[...]).max(axis=(1, 2))
        assert (per_layer > 0).all(), path


def test_dropout_needs_a_key_and_keeps_the_mean(model):
    lora = trained(dropout=0.5)
    one, again, other = (logits(model, lora, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.01 and np.abs(one - logits(model, lora)).max() > 0.01
    adapter = jax.tree.map(lambda x: x[0], lora.adapters["query"])
    x = jnp.ones((4000, 32))
    dropped = np.asarray(adapter(x, jax.random.key(3)))
    # Standard error of the mean of 4000 draws.
    error = np.std(dropped, axis=0) / np.sqrt(len(x))
    assert (np.abs(np.mean(dropped, axis=0) - adapter(x, None)[0]) < 5 * error).all()
    assert (error > 0).all()


def test_layers_and_projections_drop_different_inputs(model):
    """The same key in every layer would tie their noise together."""
    keys = []
    lora = trained(("query", "key"))
    original = type(lora.adapters["query"]).__call__

    class Spy(type(lora.adapters["query"])):
        def __call__(self, x, key):
            jax.debug.callback(lambda k: keys.append(tuple(np.ravel(k).tolist())), jax.random.key_data(key))
            return original(self, x, key)

    for adapter in lora.adapters.values():
        adapter.__class__ = Spy
    jax.jit(lambda model, lora, key: model(model.embed(IDS), lora=lora, lora_key=key))(model, lora, jax.random.key(0))
    jax.effects_barrier()
    assert len(keys) == len(set(keys)) == 4


@pytest.mark.parametrize("options", [{"targets": ("q",)}, {"targets": ("out", "out")}, {"rank": 0}, {"dropout": 1.0}])
def test_impossible_settings_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        LoraConfig(**options)
