"""Text generation with a static key/value cache, collecting the hidden states of <SEG> tokens on the way.

The prompt is processed once; a `jax.lax.while_loop` then adds a token to every row per iteration until all rows are
done. Rows have their own lengths and do not see each other, so a row's text does not depend on its batch.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from esg_jax.models.language.llama import KVCache, Llama
from esg_jax.ops.segment_tokens import CONVENTIONS, SegHidden


@dataclasses.dataclass(frozen=True)
class DecodingConfig:
    """How text is generated.

    Attributes:
        eos_id, pad_id: end of the text; what fills the rows behind it.
        max_new_tokens: longest answer, the end token included.
        seg_id: the <SEG> token, or None when there is none to collect.
        max_segs: a row ends with its `max_segs`-th <SEG>.
        seg_hidden: which hidden state speaks for a <SEG> (see `esg_jax.ops.segment_tokens`).
        temperature: 0 is greedy.
        top_p: sample among the most probable tokens that together reach this probability.
        suppress: ids that are never generated, such as <image> and <pad>.
        vocab_size: ids from here on are never generated; needed when the embedding has unused rows.
    """

    eos_id: int
    pad_id: int
    max_new_tokens: int = 512
    seg_id: int | None = None
    max_segs: int = 64
    seg_hidden: SegHidden = "at"
    temperature: float = 0.0
    top_p: float = 1.0
    suppress: tuple[int, ...] = ()
    vocab_size: int | None = None

    def __post_init__(self):
        if self.seg_hidden not in CONVENTIONS:
            raise ValueError(f"seg_hidden is {self.seg_hidden!r}; choose one of {', '.join(CONVENTIONS)}")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature ({self.temperature}) must be >= 0 and top_p ({self.top_p}) in (0, 1]")
        if self.max_new_tokens < 1 or self.max_segs < 1:
            raise ValueError(f"max_new_tokens ({self.max_new_tokens}) and max_segs ({self.max_segs}) must be positive")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generation:
    """Generated text.

    Attributes:
        ids: tokens, the end token included, padded with `pad_id`.
        lengths: number of tokens of every row.
        finished: the row ended with the end token; the others were cut off.
        seg_hidden: hidden states of the <SEG> tokens in order, zeros behind them.
        seg_counts: <SEG> tokens of every row.
    """

    ids: Int[Array, "b n"]
    lengths: Int[Array, "b"]
    finished: Bool[Array, "b"]
    seg_hidden: Float[Array, "b v d"]
    seg_counts: Int[Array, "b"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """Of the loop: what is generated, the newest token of every row (not yet seen by the model) and who is done."""

    out: Generation
    token: Int[Array, "b"]
    done: Bool[Array, "b"]
    cache: KVCache


def generate(
    model: Llama,
    x_btd: Float[Array, "b t d"],
    lengths_b: Int[Array, "b"],
    config: DecodingConfig,
    *,
    keys_b: Array | None = None,
    lora: nnx.Module | None = None,
    pin: Callable[[Array], Array] | None = None,
) -> Generation:
    """Continues every prompt until the end token, the length limit or the last allowed <SEG>.

    Wrap it in `jax.jit` with `config` static.

    Args:
        model: the language model; its `config.max_length` also ends a row.
        x_btd: embedded prompts, image tokens in place, padded on the right.
        lengths_b: real lengths of the prompts, at least 1.
        config: how to choose tokens and when to stop.
        keys_b: one random key per row, needed when `config.temperature` > 0.
        lora: adapters of the model.
        pin: see `Llama`.

    Returns:
        The answers; <SEG> tokens of the prompt are not part of them.

    Raises:
        ValueError: sampling without keys, or a prompt that leaves no room for an answer.
    """
    batch, prompt_length = x_btd.shape[:2]
    capacity = min(prompt_length + config.max_new_tokens, model.config.max_length)
    if prompt_length >= model.config.max_length:
        raise ValueError(
            f"a prompt of {prompt_length} tokens leaves no room below max_length {model.config.max_length}"
        )
    if config.temperature > 0 and keys_b is None:
        raise ValueError("sampling (temperature > 0) needs keys_b, one random key per row")
    limits_b = jnp.minimum(config.max_new_tokens, capacity - lengths_b)

    def next_token(hidden_bd, counts_b):
        logits_bv = _allowed(model.logits(hidden_bd), config)
        if config.temperature == 0:
            return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)
        step_keys = jax.vmap(jax.random.fold_in)(keys_b, counts_b)
        return jax.vmap(sample_top_p, (0, 0, None, None))(step_keys, logits_bv, config.temperature, config.top_p)

    def collect(out: Generation, hidden_bd, where_b) -> Generation:
        """Appends a hidden state to the <SEG> states of some rows."""
        slots_b = jnp.where(where_b, out.seg_counts, config.max_segs)  # out of range: not written
        states = _put(out.seg_hidden, slots_b, hidden_bd.astype(jnp.float32))
        return dataclasses.replace(out, seg_hidden=states, seg_counts=out.seg_counts + where_b)

    def extend(out: Generation, cache, hidden_bd, done_b) -> _State:
        """Chooses the token after `hidden_bd` for the rows that go on."""
        token_b = jnp.where(done_b, config.pad_id, next_token(hidden_bd, out.lengths))
        slots_b = jnp.where(done_b, config.max_new_tokens, out.lengths)
        is_end = ~done_b & (token_b == config.eos_id)
        is_seg = jnp.zeros_like(done_b) if config.seg_id is None else ~done_b & (token_b == config.seg_id)
        out = dataclasses.replace(
            out,
            ids=_put(out.ids, slots_b, token_b),
            lengths=out.lengths + ~done_b,
            finished=out.finished | is_end,
        )
        full_b = out.lengths >= limits_b
        if config.seg_hidden == "predict":
            out = collect(out, hidden_bd, is_seg)
            done_b = done_b | is_end | full_b | (out.seg_counts >= config.max_segs)
        else:  # a final <SEG> is still to be seen by the model, which yields its state
            done_b = done_b | is_end | (full_b & ~is_seg)
        return _State(out, token_b, done_b, cache)

    def step(state: _State) -> _State:
        hidden, cache = model(model.embed(state.token[:, None]), cache=state.cache, lora=lora, pin=pin)
        out, done_b = state.out, state.done
        if config.seg_hidden == "at" and config.seg_id is not None:
            out = collect(out, hidden[:, 0], ~done_b & (state.token == config.seg_id))
            done_b = done_b | (out.lengths >= limits_b) | (out.seg_counts >= config.max_segs)
        return extend(out, cache, hidden[:, 0], done_b)

    cache = KVCache.empty(model.config, batch, capacity, model.dtype)
    hidden, cache = model(x_btd, cache=cache, lora=lora, pin=pin)
    last_bd = jnp.take_along_axis(hidden, (lengths_b - 1)[:, None, None], axis=1)[:, 0]
    cache = dataclasses.replace(cache, lengths=lengths_b.astype(jnp.int32))
    out = Generation(
        ids=jnp.full((batch, config.max_new_tokens), config.pad_id, jnp.int32),
        lengths=jnp.zeros(batch, jnp.int32),
        finished=jnp.zeros(batch, bool),
        seg_hidden=jnp.zeros((batch, config.max_segs, model.config.width), jnp.float32),
        seg_counts=jnp.zeros(batch, jnp.int32),
    )
    state = extend(out, cache, last_bd, jnp.zeros(batch, bool))
    return jax.lax.while_loop(lambda state: ~jnp.all(state.done), step, state).out


@jax.vmap
def _put(row_n, slot, value):
    """Every row with a value in one slot, or unchanged if the slot is out of range."""
    return row_n.at[slot].set(value, mode="drop")


def _allowed(logits_bv: Float[Array, "b v"], config: DecodingConfig) -> Float[Array, "b v"]:
    """Logits with -inf at the ids that must not be generated."""
    if config.vocab_size is not None:
        logits_bv = jnp.where(jnp.arange(logits_bv.shape[-1]) < config.vocab_size, logits_bv, -jnp.inf)
    if config.suppress:
        logits_bv = logits_bv.at[:, jnp.asarray(config.suppress)].set(-jnp.inf)
    return logits_bv


def sample_top_p(
    key: Array, logits_v: Float[Array, "v"], temperature: float = 1.0, top_p: float = 1.0
) -> Int[Array, ""]:
    """Draws a token among the most probable ones, up to and including the one that reaches `top_p` in total.

    Source: Holtzman et al. 2020, section 3.1 (nucleus sampling), with temperature before the cut.
    """
    logits_v = logits_v / temperature
    order_v = jnp.argsort(-logits_v)
    sorted_v = logits_v[order_v]
    probability_v = jax.nn.softmax(sorted_v)
    before_v = jnp.cumsum(probability_v) - probability_v
    choice = jax.random.categorical(key, jnp.where(before_v < top_p, sorted_v, -jnp.inf))
    return order_v[choice].astype(jnp.int32)
