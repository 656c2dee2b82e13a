"""Losses of GELLA: reconstruction of entities, association with nouns, answers (ESG, section 4.3; L = sum of three)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from esg_jax.losses.cropformer import Assignment, LossConfig

# Tokens whose logits exist at one time: 512 x 32,064 float32 logits are 66 MB per sample.
_ANSWER_CHUNK = 512


@dataclasses.dataclass(frozen=True)
class GellaLossConfig:
    """Weights and switches.

    Attributes:
        segmentation, association, answer: weights of the three losses ("uniform" in the paper). An answer of 0 is not
            computed at all.
        reconstruction: inside the segmentation loss; the paper cites Mask2Former for it.
        unmatched: pairs of a noun and a query without entity are "negative", or "ignore" leaves them out.
        pos_weight: on positive pairs.
        normalise: of a noun's pairs that count the "mean", or "per_noun_sum" their sum; then the mean over nouns.
    """

    segmentation: float = 1.0
    association: float = 1.0
    answer: float = 1.0
    reconstruction: LossConfig = LossConfig()
    unmatched: str = "negative"
    pos_weight: float = 1.0
    normalise: str = "mean"

    def __post_init__(self):
        if self.unmatched not in ("negative", "ignore"):
            raise ValueError(f"loss.unmatched is {self.unmatched!r}; choose negative or ignore")
        if self.normalise not in ("mean", "per_noun_sum"):
            raise ValueError(f"loss.normalise is {self.normalise!r}; choose mean or per_noun_sum")

    def flat(self) -> "GellaLossConfig":
        """All weights 1, the literal reading of "uniform"."""
        ones = dataclasses.replace(self.reconstruction, class_weight=1.0, mask_weight=1.0, dice_weight=1.0)
        return dataclasses.replace(self, segmentation=1.0, association=1.0, answer=1.0, reconstruction=ones)


def association_target(
    links_bvn: Bool[Array, "b v n"], assignment: Assignment, num_queries: int
) -> tuple[Bool[Array, "b v q"], Bool[Array, "b q"]]:
    """G^A: which queries every noun refers to.

    A noun may have several entities (plurals), an entity several nouns.

    Args:
        links_bvn: noun v refers to entity n.
        assignment: query of every entity, (B, N).
        num_queries: Q.

    Returns:
        The target, and which queries hold an entity.
    """
    one_hot = jax.nn.one_hot(assignment.query, num_queries, dtype=jnp.float32) * assignment.matched[..., None]
    target = jnp.einsum("bvn,bnq->bvq", links_bvn.astype(jnp.float32), one_hot) > 0
    return target, jnp.any(one_hot > 0, axis=1)


def association_loss(
    logits_bvq: Float[Array, "b v q"],
    links_bvn: Bool[Array, "b v n"],
    linked_bv: Bool[Array, "b v"],
    assignment: Assignment,
    config: GellaLossConfig,
    *,
    normalizer: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Binary cross entropy of noun-query pairs.

    Args:
        logits_bvq: A of eq. 16.
        links_bvn, linked_bv: entities of every noun, and which nouns have a link at all; the others do not count.
        assignment: of entities to queries by the last decoder layer.
        config: switches.
        normalizer: number of nouns that count in the whole batch; by default of this one.
    """
    queries = logits_bvq.shape[-1]
    target, occupied = association_target(links_bvn, assignment, queries)
    logits = logits_bvq.astype(jnp.float32)
    positive = config.pos_weight * jax.nn.softplus(-logits)
    loss = jnp.where(target, positive, jax.nn.softplus(logits))
    weight = jnp.broadcast_to(linked_bv[..., None], loss.shape).astype(jnp.float32)
    if config.unmatched == "ignore":
        weight = weight * occupied[:, None]
    per_noun = jnp.sum(loss * weight, axis=-1)
    if config.normalise == "mean":
        per_noun = per_noun / jnp.maximum(jnp.sum(weight, axis=-1), 1.0)
    nouns = jnp.sum(linked_bv) if normalizer is None else normalizer
    return jnp.sum(per_noun) / jnp.maximum(nouns, 1)


def answer_loss(
    logits_of: Callable[[Array], Array],
    hidden_btd: Float[Array, "b t d"],
    ids_bt: Int[Array, "b t"],
    answer_bt: Bool[Array, "b t"],
    *,
    normalizer: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Cross entropy of the answers' tokens, `<SEG>` and the end of turn included.

    Args:
        logits_of: (B, t, D) -> float32 (B, t, vocabulary); called on pieces of the sequence, which are recomputed in
            the backward pass, so that the logits of a long sequence never exist at once.
        hidden_btd: of every token; position t - 1 predicts token t.
        ids_bt: the tokens.
        answer_bt: tokens that count.
        normalizer: number of counting tokens in the whole batch; by default of this one.
    """
    tokens = ids_bt.shape[1] - 1
    chunk = min(_ANSWER_CHUNK, tokens)
    padding = -tokens % chunk

    def pieces(x):
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(len(x), -1, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one(total, piece):
        hidden, target, keep = piece
        logits = logits_of(hidden)
        picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        loss = jax.nn.logsumexp(logits, axis=-1) - picked
        return total + jnp.sum(jnp.where(keep, loss, 0.0)), None

    counted = answer_bt[:, 1:]
    xs = (pieces(hidden_btd[:, :-1]), pieces(ids_bt[:, 1:]), pieces(counted))
    total, _ = jax.lax.scan(one, jnp.zeros(()), xs)
    count = jnp.sum(counted) if normalizer is None else normalizer
    return total / jnp.maximum(count, 1)
