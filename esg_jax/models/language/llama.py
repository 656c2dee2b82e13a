"""LLaMA-family language model: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Covers LLaMA-2 / Vicuna (full attention, own head) and SmolLM2 (grouped queries, head tied to the embedding). The
layers are stacked: every weight has a leading layer axis, and one `jax.lax.scan` runs them, so that compile time and
program size do not grow with depth. Rotary positions use the half-split layout of Hugging Face weights.

Sources: LLaMA-2 (Touvron et al. 2023, section 2.2), RoFormer (Su et al. 2021, eq. 34), GQA (Ainslie et al. 2023).
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from esg_jax.models import layers

normal_init = nnx.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes of the language model; the defaults are LLaVA-1.5-7B's.

    Attributes:
        vocab_size: rows of the embedding, those for special tokens and padding included.
        width: channels of the residual stream.
        num_layers: blocks.
        num_heads, num_kv_heads: query heads, and the key/value heads that they share in equal groups.
        ffn_dim: hidden channels of the gated feed-forward.
        norm_eps: of every RMSNorm (1e-5: LLaMA-2, Vicuna-1.5, SmolLM2; 1e-6: LLaMA-1).
        rope_base: base of the rotary frequencies.
        max_length: longest sequence the weights were trained for; nothing here depends on it.
        tied: the head is the transposed embedding.
    """

    vocab_size: int = 32064
    width: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    ffn_dim: int = 11008
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    max_length: int = 4096
    tied: bool = False

    def __post_init__(self):
        if self.width % self.num_heads or self.head_dim % 2:
            raise ValueError(f"width ({self.width}) must be num_heads ({self.num_heads}) times an even head size")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.width // self.num_heads

    @classmethod
    def llama_7b(cls, vocab_size: int = 32064) -> "LlamaConfig":
        """LLaMA-2-7B, Vicuna-7B-v1.5; with LLaVA's 64 additional rows."""
        return cls(vocab_size=vocab_size)

    @classmethod
    def llama_13b(cls, vocab_size: int = 32064) -> "LlamaConfig":
        """LLaMA-2-13B, Vicuna-13B-v1.5; with LLaVA's 64 additional rows."""
        return cls(vocab_size=vocab_size, width=5120, num_layers=40, num_heads=40, num_kv_heads=40, ffn_dim=13824)

    @classmethod
    def smollm2_135m(cls, vocab_size: int = 49216) -> "LlamaConfig":
        """SmolLM2-135M: 49152 pieces, with 64 additional rows for special tokens."""
        return cls(
            vocab_size=vocab_size,
            width=576,
            num_layers=30,
            num_heads=9,
            num_kv_heads=3,
            ffn_dim=1536,
            rope_base=100000.0,
            max_length=8192,
            tied=True,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens seen so far; a row's token at position p lies in slot p.

    Attributes:
        k, v: rotated keys and values of all layers, in the compute type.
        lengths: filled slots of every row. Slots behind them may hold anything: they are overwritten before a query
            can see them, which is what makes right-padded prompts of different lengths possible.
    """

    k: Float[Array, "l b s k d"]
    v: Float[Array, "l b s k d"]
    lengths: Int[Array, "b"]

    @classmethod
    def empty(cls, config: LlamaConfig, batch: int, max_length: int, dtype=jnp.float32) -> "KVCache":
        """A cache for `batch` rows of at most `max_length` tokens."""
        shape = (config.num_layers, batch, max_length, config.num_kv_heads, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch, jnp.int32))


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, in float32; the result has the type of x."""

    def __init__(self, features: int, eps: float, *, stack: tuple[int, ...] = (), param_dtype=jnp.float32):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((*stack, features), param_dtype))

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class Projection(nnx.Module):
    """Linear map without bias; `stack` prepends axes to the kernel, which must be sliced away before a call."""

    def __init__(
        self, fan_in: int, fan_out: int, *, rngs: nnx.Rngs, stack: tuple[int, ...] = (), dtype, param_dtype=jnp.float32
    ):
        self.dtype = dtype
        self.kernel = nnx.Param(normal_init(rngs.params(), (*stack, fan_in, fan_out), param_dtype))

    def __call__(self, x: Float[Array, "... c"], preferred_element_type=None) -> Float[Array, "... d"]:
        kernel = self.kernel[...].astype(self.dtype)
        return jnp.einsum("...c,cd->...d", x.astype(self.dtype), kernel, preferred_element_type=preferred_element_type)


class Attention(nnx.Module):
    """Causal self attention with rotary positions; key/value heads are shared by groups of query heads."""

    def __init__(self, config: LlamaConfig, *, rngs, stack, dtype, param_dtype):
        kwargs = dict(rngs=rngs, stack=stack, dtype=dtype, param_dtype=param_dtype)
        kv_width = config.num_kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.query = Projection(config.width, config.width, **kwargs)
        self.key = Projection(config.width, kv_width, **kwargs)
        self.value = Projection(config.width, kv_width, **kwargs)
        self.out = Projection(config.width, config.width, **kwargs)

    def __call__(self, x_btc, rotation, cache: KVCache | None, layer: Int[Array, ""], adapted):
        """Returns the attended tokens and the cache with this layer's keys and values added, lengths unchanged."""
        query, key, value = (
            adapted(name, getattr(self, name), x_btc).reshape(*x_btc.shape[:2], -1, self.head_dim)  # b t heads d
            for name in ("query", "key", "value")
        )
        query, key = rotate(query, *rotation), rotate(key, *rotation)
        if cache is None:
            attended = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        else:
            slots_bt = cache.lengths[:, None] + jnp.arange(x_btc.shape[1])
            keys = _write(cache.k, key, layer, cache.lengths)
            values = _write(cache.v, value, layer, cache.lengths)
            cache = dataclasses.replace(cache, k=keys, v=values)
            visible_bts = jnp.arange(cache.k.shape[2]) <= slots_bt[..., None]
            key, value = (jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in (keys, values))
            attended = jax.nn.dot_product_attention(
                query, key.astype(query.dtype), value.astype(query.dtype), mask=visible_bts[:, None]
            )
        return adapted("out", self.out, attended.reshape(x_btc.shape)), cache


class GatedMLP(nnx.Module):
    """SwiGLU feed-forward: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig, *, rngs, stack, dtype, param_dtype):
        kwargs = dict(rngs=rngs, stack=stack, dtype=dtype, param_dtype=param_dtype)
        self.gate = Projection(config.width, config.ffn_dim, **kwargs)
        self.up = Projection(config.width, config.ffn_dim, **kwargs)
        self.down = Projection(config.ffn_dim, config.width, **kwargs)

    def __call__(self, x_btc, adapted):
        hidden = jax.nn.silu(adapted("gate", self.gate, x_btc)) * adapted("up", self.up, x_btc)
        return adapted("down", self.down, hidden)


class Block(nnx.Module):
    """Pre-norm residual attention and feed-forward."""

    def __init__(self, config: LlamaConfig, *, rngs, stack, dtype, param_dtype):
        kwargs = dict(rngs=rngs, stack=stack, dtype=dtype, param_dtype=param_dtype)
        norm = dict(stack=stack, param_dtype=param_dtype)
        self.attention_norm = RMSNorm(config.width, config.norm_eps, **norm)
        self.attention = Attention(config, **kwargs)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps, **norm)
        self.mlp = GatedMLP(config, **kwargs)

    def __call__(self, x_btc, rotation, cache, layer, adapted):
        attended, cache = self.attention(self.attention_norm(x_btc), rotation, cache, layer, adapted)
        x_btc = x_btc + attended
        return x_btc + self.mlp(self.mlp_norm(x_btc), adapted), cache


class Llama(nnx.Module):
    """Decoder-only transformer over embedded tokens, so that a caller may put image tokens among them."""

    def __init__(
        self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32, remat: bool = False
    ):
        """`remat` recomputes every block in the backward pass, which then stores one (B, T, D) array per layer."""
        self.config = config
        self.dtype = dtype
        self.remat = remat
        kwargs = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.embed = nnx.Embed(config.vocab_size, config.width, embedding_init=normal_init, **kwargs)
        self.layers = Block(config, stack=(config.num_layers,), **kwargs)
        self.norm = RMSNorm(config.width, config.norm_eps, param_dtype=param_dtype)
        if not config.tied:
            self.head = Projection(config.width, config.vocab_size, **kwargs)

    def __call__(
        self,
        x_btd: Float[Array, "b t d"],
        positions_bt: Int[Array, "b t"] | None = None,
        *,
        cache: KVCache | None = None,
        num_blocks: int | None = None,
        lora: nnx.Module | None = None,
        lora_key: Array | None = None,
        pin: Callable[[Array], Array] | None = None,
    ) -> tuple[Float[Array, "b t d"], KVCache | None]:
        """Runs all blocks, or the first few.

        Without a cache a token sees itself and those before it in the row, so padding must be on the right. With a
        cache the tokens continue every row at its own length: an empty cache is filled by a prompt, a filled one is
        extended token by token.

        Args:
            x_btd: embedded tokens.
            positions_bt: rotary positions; default: the place in the row.
            cache: earlier keys and values, with room for T more tokens; a row without it keeps none of them.
            num_blocks: run only so many, without a cache.
            lora: adapters from `esg_jax.models.language.lora`.
            lora_key: key of the adapters' dropout; None: no dropout.
            pin: applied to the states before every block and behind the last; a caller that splits the batch over
                devices says so again here, since the weights of a block, split too, would have it otherwise.

        Returns:
            Hidden states after the final norm, and the cache extended by T (None without one). After a right-padded
            prompt the caller sets `lengths` back to the real ones.

        Raises:
            ValueError: more tokens than the cache has slots, or a cache for some of the blocks only.
        """
        batch, length = x_btd.shape[:2]
        if cache is not None and num_blocks is not None:
            raise ValueError("a cache holds the keys of all blocks; run it without num_blocks")
        if cache is not None and length > cache.k.shape[2]:
            raise ValueError(f"{length} tokens do not fit a cache of {cache.k.shape[2]} slots")
        if positions_bt is None:
            start = jnp.zeros(batch, jnp.int32) if cache is None else cache.lengths
            positions_bt = start[:, None] + jnp.arange(length)
        rotation = rotary(positions_bt, self.config.head_dim, self.config.rope_base)

        pin = pin or (lambda x: x)

        def run(block, x, cache, adapters, layer):
            key = None if lora_key is None else jax.random.fold_in(lora_key, layer)
            return block(pin(x), rotation, cache, layer, _adapted(adapters, key))

        def body(carry, xs):
            return layers.remat(run, self.remat)(xs[0], *carry, *xs[1:]), None

        adapters = {} if lora is None else dict(lora.adapters)
        xs = (self.layers, adapters, jnp.arange(self.config.num_layers))
        if num_blocks is not None:
            xs = jax.tree.map(lambda x: x[:num_blocks], xs)
        (x_btd, cache), _ = jax.lax.scan(body, (x_btd.astype(self.dtype), cache), xs)
        x_btd = pin(x_btd)
        if cache is not None:
            cache = dataclasses.replace(cache, lengths=cache.lengths + length)
        return self.norm(x_btd), cache

    def logits(self, hidden_btd: Float[Array, "... d"]) -> Float[Array, "... v"]:
        """Scores of the next token, float32."""
        if not self.config.tied:
            return self.head(hidden_btd, preferred_element_type=jnp.float32)
        embedding = self.embed.embedding[...].astype(self.dtype)
        return jnp.einsum("...d,vd->...v", hidden_btd, embedding, preferred_element_type=jnp.float32)


def _write(
    cache_lbskd: Float[Array, "l b s k d"],
    new_btkd: Float[Array, "b t k d"],
    layer: Int[Array, ""],
    start_b: Int[Array, "b"],
) -> Float[Array, "l b s k d"]:
    """Puts keys or values into one layer's slots from `start_b` on; a row whose slots do not all exist stays as it is.

    A scatter into the loop's carry happens in place; slicing the layer out and back would copy it. Naming the batch as
    such, instead of indexing it, lets the compiler keep every row of the cache on the device that has the row.
    """
    indices_bi = jnp.stack([jnp.broadcast_to(layer, start_b.shape), start_b], axis=-1)
    dims = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2, 3),
        inserted_window_dims=(0,),
        scatter_dims_to_operand_dims=(0, 2),
        operand_batching_dims=(1,),
        scatter_indices_batching_dims=(0,),
    )
    new_btkd = new_btkd.astype(cache_lbskd.dtype)
    return jax.lax.scatter(
        cache_lbskd, indices_bi, new_btkd, dims, indices_are_sorted=True, unique_indices=True, mode="drop"
    )


def _adapted(adapters: Mapping[str, nnx.Module], key: Array | None):
    """A function that applies a projection and, if there is one under its name, the low-rank adapter beside it."""

    def apply(name, projection, x):
        y = projection(x)
        if name not in adapters:
            return y
        adapter_key = None if key is None else jax.random.fold_in(key, list(adapters).index(name))
        return y + adapters[name](x, adapter_key).astype(y.dtype)

    return apply


def rotary(
    positions_bt: Int[Array, "b t"], head_dim: int, base: float
) -> tuple[Float[Array, "b t 1 h"], Float[Array, "b t 1 h"]]:
    """Cosine and sine of the rotation angles, float32; h = head_dim / 2 frequencies base^(-2i / head_dim)."""
    frequencies = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions_bt[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_bthd: Float[Array, "b t h d"], cos, sin) -> Float[Array, "b t h d"]:
    """Rotates the pairs (channel i, channel i + d/2) of every head by the angles of its position."""
    first, second = jnp.split(x_bthd.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_bthd.dtype)


def with_new_tokens(llm: Llama, ids: tuple[int, ...], known: int = 32000) -> Llama:
    """The model with the rows of new tokens, in embedding and head, set to the mean of the first `known` rows.

    transformers' LLaVA files have spare rows whose content means nothing, so `<SEG>` needs this before training.
    The model is not changed.

    Raises:
        ValueError: an id that is among the known ones or outside the vocabulary.
    """
    wrong = [i for i in ids if not known <= i < llm.config.vocab_size]
    if wrong:
        raise ValueError(f"token ids {wrong} must be within [{known}, {llm.config.vocab_size - 1}]")
    llm = nnx.clone(llm)
    rows = jnp.array(ids)
    for parameter, axis in [(llm.embed.embedding, 0)] + ([] if llm.config.tied else [(llm.head.kernel, 1)]):
        value = parameter[...]
        mean = jax.lax.slice_in_dim(value, 0, known, axis=axis).mean(axis, dtype=jnp.float32).astype(value.dtype)
        parameter[...] = value.at[rows].set(mean) if axis == 0 else value.at[:, rows].set(mean[:, None])
    return llm
