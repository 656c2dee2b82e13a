"""Cached generation against full forward passes of the same small model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from esg_jax.inference.grounding.decoding import DecodingConfig, generate, sample_top_p
from esg_jax.interop.convert import load_into
from esg_jax.models.language.llama import Llama, LlamaConfig
from esg_jax.ops.segment_tokens import find_tokens, token_states
from esg_jax.sharding import make_mesh, partition_specs, put_batch
from esg_jax.weights import named_arrays

LENGTHS = np.array([3, 7, 1, 5])
NEW = 12
NEVER = 1000  # an id outside the vocabulary: no end token
BASE = DecodingConfig(eos_id=NEVER, pad_id=0, max_new_tokens=NEW, max_segs=4)
run = jax.jit(generate, static_argnames="config")


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(vocab_size=29, width=24, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=32, max_length=64)
    model = Llama(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(3)
    nnx.update(
        model, jax.tree.map(lambda x: jnp.asarray(rng.normal(scale=0.4, size=x.shape), x.dtype), nnx.state(model))
    )
    return model


@pytest.fixture(scope="module")
def prompts():
    ids = np.random.default_rng(5).integers(1, 29, (len(LENGTHS), LENGTHS.max()))
    return np.where(np.arange(LENGTHS.max()) < LENGTHS[:, None], ids, 0)


@pytest.fixture(scope="module")
def greedy(model, prompts):
    """12 greedy tokens after every prompt."""
    return run(model, model.embed(prompts), LENGTHS, BASE)


@pytest.fixture(scope="module")
def seg_id(greedy):
    """The token that occurs in the most rows, several times in one: it plays <SEG>."""
    counts = np.stack([np.bincount(row, minlength=29) for row in np.asarray(greedy.ids)])
    seg_id = int(np.argmax((counts > 0).sum(axis=0) + (counts > 1).any(axis=0)))
    assert (counts[:, seg_id] > 0).sum() >= 2 and counts[:, seg_id].max() >= 2
    return seg_id


def sequences(prompts, ids):
    """Prompt and answer in one right-padded array."""
    rows = [np.concatenate([p[:n], a]) for p, n, a in zip(prompts, LENGTHS, np.asarray(ids), strict=True)]
    return np.stack([np.pad(row, (0, LENGTHS.max() + NEW - len(row))) for row in rows])


@jax.jit
def forward(model, ids):
    hidden, _ = model(model.embed(ids))
    return hidden, model.logits(hidden)


def test_greedy_tokens_are_those_of_full_passes(model, prompts, greedy):
    np.testing.assert_array_equal(greedy.lengths, NEW)
    assert not greedy.finished.any()
    _, logits = forward(model, sequences(prompts, greedy.ids))
    best = np.argmax(logits, axis=-1)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_array_equal(greedy.ids[row], best[row, length - 1 : length - 1 + NEW])


def test_a_row_does_not_depend_on_its_batch(model, prompts, greedy):
    for row, length in enumerate(LENGTHS):
        alone = run(model, model.embed(prompts[row : row + 1]), LENGTHS[row : row + 1], BASE)
        np.testing.assert_array_equal(alone.ids[0], greedy.ids[row], err_msg=f"prompt of {length}")


@pytest.mark.parametrize("convention", ["at", "predict"])
@pytest.mark.parametrize("stop", ["length", "max_segs"])
def test_seg_states_are_those_of_the_forced_text(model, prompts, greedy, seg_id, convention, stop):
    first = np.asarray(greedy.ids == seg_id).argmax(axis=1)
    config = dataclasses.replace(
        BASE,
        seg_id=seg_id,
        seg_hidden=convention,
        max_segs=1 if stop == "max_segs" else NEW,
        # The length limit falls on a <SEG> in one row: its state exists only after one more step.
        max_new_tokens=int(first.max()) + 1 if stop == "length" else NEW,
    )
    out = run(model, model.embed(prompts), LENGTHS, config)
    hidden, _ = forward(model, sequences(prompts, greedy.ids))
    for row, prompt in enumerate(LENGTHS):
        length = int(out.lengths[row])
        np.testing.assert_array_equal(out.ids[row, :length], greedy.ids[row, :length])
        answer = np.full((1, hidden.shape[1]), NEVER)  # the prompt's own tokens do not count
        answer[0, prompt : prompt + length] = greedy.ids[row, :length]
        positions, valid = find_tokens(answer, seg_id, config.max_segs)
        assert out.seg_counts[row] == valid.sum() == (np.asarray(out.ids[row, :length]) == seg_id).sum()
        wanted = token_states(hidden[row : row + 1], positions, valid, convention)[0]
        np.testing.assert_allclose(out.seg_hidden[row], wanted, atol=1e-5)
        if stop == "max_segs":
            assert length == (first[row] + 1 if seg_id in greedy.ids[row] else NEW)
        else:
            assert length == config.max_new_tokens


def test_conventions_give_different_states(model, prompts, seg_id):
    out = [
        run(model, model.embed(prompts), LENGTHS, dataclasses.replace(BASE, seg_id=seg_id, seg_hidden=name, max_segs=1))
        for name in ("at", "predict")
    ]
    assert np.abs(out[0].seg_hidden - out[1].seg_hidden).max() > 0.1


def test_end_token_stops_its_row_only(model, prompts, greedy):
    eos = int(greedy.ids[0, 4])
    out = run(model, model.embed(prompts), LENGTHS, dataclasses.replace(BASE, eos_id=eos))
    for row in range(len(LENGTHS)):
        ends = np.flatnonzero(greedy.ids[row] == eos)
        length = ends[0] + 1 if len(ends) else NEW
        assert out.lengths[row] == length and out.finished[row] == bool(len(ends))
        np.testing.assert_array_equal(out.ids[row, :length], greedy.ids[row, :length])
        assert (out.ids[row, length:] == BASE.pad_id).all()


def test_context_length_ends_rows_at_different_answers(model, prompts, greedy):
    short = Llama(dataclasses.replace(model.config, max_length=10), rngs=nnx.Rngs(0))
    nnx.update(short, nnx.state(model))
    out = run(short, model.embed(prompts), LENGTHS, BASE)
    np.testing.assert_array_equal(out.lengths, 10 - LENGTHS)
    for row, length in enumerate(10 - LENGTHS):
        np.testing.assert_array_equal(out.ids[row, :length], greedy.ids[row, :length])
    with pytest.raises(ValueError, match="no room below max_length 10"):
        generate(short, jnp.zeros((1, 10, 24)), np.array([2]), BASE)


def test_suppressed_and_unused_ids_are_never_generated(model, prompts, greedy):
    common = int(np.bincount(np.asarray(greedy.ids).ravel()).argmax())
    out = run(model, model.embed(prompts), LENGTHS, dataclasses.replace(BASE, suppress=(common,), vocab_size=20))
    assert out.ids.max() < 20 and not (out.ids == common).any()
    assert greedy.ids.max() >= 20


def test_sampled_rows_follow_their_own_keys(model, prompts):
    config = dataclasses.replace(BASE, temperature=1.0, top_p=0.95)
    keys = jax.random.split(jax.random.key(0), len(LENGTHS))
    out = run(model, model.embed(prompts), LENGTHS, config, keys_b=keys)
    for row in (0, 1):
        part = slice(row, row + 1)
        alone = run(model, model.embed(prompts[part]), LENGTHS[part], config, keys_b=keys[part])
        np.testing.assert_array_equal(alone.ids[0], out.ids[row])
    other = run(model, model.embed(prompts), LENGTHS, config, keys_b=keys[::-1])
    assert (other.ids != out.ids).any()
    with pytest.raises(ValueError, match="keys_b"):
        generate(model, model.embed(prompts), LENGTHS, config)


def test_top_p_keeps_the_nucleus_and_its_proportions():
    probability = np.array([0.05, 0.4, 0.2, 0.3, 0.05])
    keys = jax.random.split(jax.random.key(1), 20000)
    draw = jax.jit(jax.vmap(sample_top_p, (0, None, None, None)))
    counts = np.bincount(draw(keys, jnp.log(probability), 1.0, 0.75), minlength=5) / len(keys)
    # 0.4 + 0.3 < 0.75 <= 0.4 + 0.3 + 0.2; three standard deviations of a share are about 0.011.
    np.testing.assert_allclose(counts, np.array([0, 0.4, 0.2, 0.3, 0]) / 0.9, atol=0.011)
    assert counts[0] == counts[4] == 0
    sharper = np.bincount(draw(keys, jnp.log(probability), 0.5, 1.0), minlength=5) / len(keys)
    np.testing.assert_allclose(sharper, probability**2 / (probability**2).sum(), atol=0.011)
    assert (draw(keys[:100], jnp.log(probability), 1.0, 1e-6) == 1).all()


def test_sharded_generation_keeps_rows_and_heads_where_they_are(model, prompts, greedy):
    """Two devices share the rows, two the heads; every device holds a quarter of the cache."""
    mesh = make_mesh(2, 1, 2, devices=jax.devices()[:4])
    columns = r"(query|key|value|gate|up)\.kernel$"
    rules = ((columns, P(None, None, "model")), (r"(out|down)\.kernel$", P(None, "model")), (r"", P()))
    arrays = named_arrays(model)
    specs = partition_specs(arrays, rules, mesh)
    placed = {name: jax.device_put(value, NamedSharding(mesh, specs[name])) for name, value in arrays.items()}
    batch = put_batch({"x": np.asarray(model.embed(prompts)), "lengths": LENGTHS}, mesh)
    compiled = run.lower(load_into(model, placed), batch["x"], batch["lengths"], BASE).compile()
    out = compiled(load_into(model, placed), batch["x"], batch["lengths"])
    np.testing.assert_array_equal(out.ids, greedy.ids)
    slots = LENGTHS.max() + NEW
    assert f"f32[2,2,{slots},1,6]" in compiled.as_text()
    assert f"f32[2,4,{slots}," not in compiled.as_text()


@pytest.mark.parametrize(
    "change", [{"seg_hidden": "before"}, {"top_p": 0.0}, {"temperature": -1.0}, {"max_new_tokens": 0}]
)
def test_impossible_settings_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(BASE, **change)


def test_token_positions_and_states():
    ids = np.array([[7, 1, 7, 7, 2], [1, 2, 3, 4, 5]])
    positions, valid = find_tokens(ids, 7, 2)
    np.testing.assert_array_equal(positions, [[0, 2], [0, 0]])
    np.testing.assert_array_equal(valid, [[True, True], [False, False]])
    hidden = jnp.arange(10.0).reshape(2, 5, 1) + 1
    np.testing.assert_array_equal(token_states(hidden, positions, valid)[..., 0], [[1, 3], [0, 0]])
    valid = np.array([[False, True], [False, False]])
    np.testing.assert_array_equal(token_states(hidden, positions, valid, "predict")[..., 0], [[0, 2], [0, 0]])
    with pytest.raises(ValueError, match="'after'"):
        token_states(hidden, positions, valid, "after")
