"""Class-aware inference of plain Mask2Former: instances, panoptic segments, semantic labels (Mask2Former, section 3).

Single view, at the original resolution, tile by tile as in `painting.py`.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from esg_jax.inference.entities.canvas import Canvas
from esg_jax.inference.entities.predictions import InstancePrediction, PanopticPrediction, Segment
from esg_jax.masks import rle
from esg_jax.ops.resize import resize_bilinear


def _for_each_tile(canvas: Canvas, values_qhw: Float[Array, "q h w"], start, visit):
    """`carry = visit(carry, values (q, y, x), inside (y, x), corner)` for every tile of one image."""
    values_thqw = values_qhw.transpose(1, 0, 2)[None]

    def step(index, carry):
        tile = canvas.tile(values_thqw, index)
        return visit(carry, tile.interpolate()[0].swapaxes(0, 1), tile.cover_tyx[0] > 0, tile.corner)

    return jax.lax.fori_loop(0, canvas.tiles[0] * canvas.tiles[1], step, start)


@functools.partial(jax.jit, static_argnames="limit")
def instance_masks(
    logits_bqk: Float[Array, "b q k"], mask_logits_bqhw: Float[Array, "b q h w"], canvas: Canvas, *, limit: int = 100
):
    """Top (query, class) pairs of every image with their overlapping masks.

    A pair scores softmax probability x mean of sigmoid(logit) over its mask, the pixels with a positive logit.

    Args:
        logits_bqk: class logits; the last class is no-object.
        mask_logits_bqhw: stride-4 mask logits.
        canvas: single-view canvas.
        limit: pairs kept, by probability; equal ones in the order of queries, then classes.

    Returns:
        Masks packed to bits along the width (b, n, s, s // 8) and scores, labels, queries (b, n).
    """
    classes = logits_bqk.shape[-1] - 1

    def one(item):
        logits_qk, mask_logits_qhw, image = item
        probability = jax.nn.softmax(logits_qk)[:, :-1].ravel()
        score, pair = jax.lax.top_k(probability, min(limit, probability.size))
        query, label = pair // classes, pair % classes

        def visit(carry, values, inside, corner):
            packed, area, quality = carry
            mask = (values > 0) & inside
            area += mask.sum((1, 2), dtype=jnp.int32)
            quality += jnp.where(mask, jax.nn.sigmoid(values), 0).sum((1, 2))
            bits = jnp.packbits(mask, axis=-1)
            return jax.lax.dynamic_update_slice(packed, bits, (0, corner[0], corner[1] // 8)), area, quality

        packed = jnp.zeros((score.size, image.length, image.length // 8), jnp.uint8)
        start = (packed, jnp.zeros(score.size, jnp.int32), jnp.zeros(score.size))
        packed, area, quality = _for_each_tile(image, mask_logits_qhw[query], start, visit)
        return packed, score * quality / (area + 1e-6), label, query

    return jax.lax.map(one, (logits_bqk, mask_logits_bqhw, canvas))


def to_instances(outputs, originals: Sequence[tuple[int, int]]) -> list[InstancePrediction]:
    """Copies the result of `instance_masks` to the host, sorted by descending score."""
    predictions = []
    for index, (height, width) in enumerate(originals):
        packed, score, label, query = (np.asarray(output[index]) for output in outputs)
        rows = np.argsort(-score, kind="stable")
        rles = [rle.encode(np.unpackbits(packed[row : row + 1, :height], axis=-1)[..., :width])[0] for row in rows]
        predictions.append(InstancePrediction(rles, score[rows], label[rows], query[rows], (height, width)))
    return predictions


@functools.partial(jax.jit, static_argnames="score_threshold")
def panoptic_masks(
    logits_bqk: Float[Array, "b q k"],
    mask_logits_bqhw: Float[Array, "b q h w"],
    canvas: Canvas,
    *,
    score_threshold: float = 0.8,
):
    """Every pixel to the query with the largest (class probability x mask probability).

    Args:
        logits_bqk: class logits; the last class is no-object.
        mask_logits_bqhw: stride-4 mask logits.
        canvas: single-view canvas.
        score_threshold: queries whose best class is no-object or not above this take no part.

    Returns:
        Owner of each pixel whose mask probability is at least 0.5, else -1 (b, s, s); per query: score, class, whether
        it takes part, pixels won, pixels of its own mask (b, q).
    """

    def one(item):
        logits_qk, mask_logits_qhw, image = item
        probability = jax.nn.softmax(logits_qk)
        score, label = probability.max(-1), probability.argmax(-1)
        keep = (label != probability.shape[-1] - 1) & (score > score_threshold)
        weight = jnp.where(keep, score, -1.0)

        def visit(carry, values, inside, corner):
            owner_map, won, own = carry
            mask = jax.nn.sigmoid(values)
            owner = jnp.argmax(weight[:, None, None] * mask, axis=0)
            wins = (owner == jnp.arange(score.size)[:, None, None]) & inside
            solid = mask >= 0.5
            owner = jnp.where(jnp.any(wins & solid, axis=0), owner, -1).astype(jnp.int16)
            won += wins.sum((1, 2), dtype=jnp.int32)
            own += (solid & inside).sum((1, 2), dtype=jnp.int32)
            return jax.lax.dynamic_update_slice(owner_map, owner, corner), won, own

        zeros = jnp.zeros(score.size, jnp.int32)
        start = (jnp.full((image.length, image.length), -1, jnp.int16), zeros, zeros)
        owner_map, won, own = _for_each_tile(image, mask_logits_qhw, start, visit)
        return owner_map, score, label, keep, won, own

    return jax.lax.map(one, (logits_bqk, mask_logits_bqhw, canvas))


def to_panoptic(
    outputs, originals: Sequence[tuple[int, int]], is_thing: Bool[np.ndarray, "k"], overlap_threshold: float = 0.8
) -> list[PanopticPrediction]:
    """Segments from the result of `panoptic_masks`; segments of one stuff class are merged.

    Args:
        outputs: of `panoptic_masks`.
        originals: (height, width) of the images.
        is_thing: which classes are countable.
        overlap_threshold: least share of its own mask that a segment must have won.
    """
    predictions = []
    for index, (height, width) in enumerate(originals):
        owner_map, score, label, keep, won, own = (np.asarray(output[index]) for output in outputs)
        owner_map = owner_map[:height, :width]
        visible = np.bincount(owner_map.ravel() + 1, minlength=score.size + 1)[1:]
        segments: list[Segment] = []
        stuff: dict[int, int] = {}
        identity = np.zeros(score.size + 1, np.int32)  # last entry: void, reached by index -1
        for query in np.flatnonzero(keep & (visible > 0) & (won > 0) & (own > 0)):
            if won[query] / own[query] < overlap_threshold:
                continue
            category = int(label[query])
            if not is_thing[category] and category in stuff:
                identity[query] = stuff[category]
                continue
            segments.append(Segment(len(segments) + 1, category, bool(is_thing[category]), float(score[query])))
            identity[query] = segments[-1].id
            if not is_thing[category]:
                stuff[category] = segments[-1].id
        predictions.append(PanopticPrediction(identity[owner_map], segments))
    return predictions


@functools.partial(jax.jit, static_argnames="padded")
def semantic_scores(
    logits_bqk: Float[Array, "b q k"], mask_logits_bqhw: Float[Array, "b q h w"], *, padded: tuple[int, int]
) -> Float[Array, "b k height width"]:
    """Class scores at the resolution of the padded network input: class x mask probability, summed over queries."""

    def one(item):
        logits_qk, mask_logits_qhw = item
        mask = jax.nn.sigmoid(resize_bilinear(mask_logits_qhw, padded, axes=(-2, -1)))
        return jnp.einsum("qk,qhw->khw", jax.nn.softmax(logits_qk)[:, :-1], mask, precision="highest")

    return jax.lax.map(one, (logits_bqk, mask_logits_bqhw))


@jax.jit
def semantic_labels(scores_bkhw: Float[Array, "b k h w"], canvas: Canvas) -> Int[Array, "b s s"]:
    """Best class of every original pixel; `canvas` is made for cells of the padded network input."""

    def one(item):
        scores_khw, image = item

        def visit(labels, values, inside, corner):
            return jax.lax.dynamic_update_slice(labels, jnp.argmax(values, axis=0).astype(jnp.int16), corner)

        start = jnp.zeros((image.length, image.length), jnp.int16)
        return _for_each_tile(image, scores_khw, start, visit)

    return jax.lax.map(one, (scores_bkhw, canvas))
