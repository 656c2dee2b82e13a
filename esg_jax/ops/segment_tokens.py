"""Where <SEG> tokens stand and which hidden state speaks for them (GELLA, ESG section 5.3)."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# "at": the state of the position that holds <SEG>. "predict": of the one before, whose output is <SEG>. Published
# grounding models use either; weights trained with one are useless with the other.
SegHidden = Literal["at", "predict"]
CONVENTIONS = ("at", "predict")


def find_tokens(
    ids_bt: Int[Array, "b t"], token_id: int, max_count: int
) -> tuple[Int[Array, "b v"], Bool[Array, "b v"]]:
    """Positions of the first `max_count` occurrences of a token in every row (0 where absent), and which exist."""

    def one_row(ids_t):
        return jnp.nonzero(ids_t == token_id, size=max_count, fill_value=0)[0]

    is_token = ids_bt == token_id
    counts_b = jnp.minimum(jnp.sum(is_token, axis=1), max_count)
    return jax.vmap(one_row)(ids_bt), jnp.arange(max_count) < counts_b[:, None]


def token_states(
    hidden_btd: Float[Array, "b t d"],
    positions_bv: Int[Array, "b v"],
    valid_bv: Bool[Array, "b v"],
    convention: SegHidden = "at",
) -> Float[Array, "b v d"]:
    """Hidden states of the tokens at `positions_bv`; zeros where not valid.

    Args:
        hidden_btd: states after the final norm.
        positions_bv: of the tokens in their rows; with "predict" none of them may be the first of its row.
        valid_bv: which entries hold a token.
        convention: which state speaks for a token.

    Raises:
        ValueError: an unknown convention.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"seg_hidden is {convention!r}; choose one of {', '.join(CONVENTIONS)}")
    shift = 1 if convention == "predict" else 0
    states = jnp.take_along_axis(hidden_btd, jnp.maximum(positions_bv - shift, 0)[..., None], axis=1)
    return jnp.where(valid_bv[..., None], states, 0)
