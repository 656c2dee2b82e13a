"""Fusion of views and painting at the original resolution, without a full-size map per query.

`fusion.py` defines the result: a query claims the pixels where its fused probability exceeds 0.5, and of several
claims the one with the highest class score wins. Here the image is cut into tiles. A query whose patch of mask logits
holds no positive value cannot claim a pixel of the tile, because interpolation and averaging never exceed the largest
value they mix. The rest take their turn from the highest class score down, a few at a time, until every pixel is
taken. The work is proportional to the number of entities around a tile, and memory to one label map.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from esg_jax.inference.entities.canvas import TILE, Canvas
from esg_jax.inference.entities.predictions import EntityPrediction
from esg_jax.inference.entities.scores import ScoreMode, entity_scores, pixel_quality
from esg_jax.masks import BACKGROUND

_FREE = -1  # while painting: no rank owns the pixel yet


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Painted:
    """Result of `paint`: rows sorted by class score, equal scores by query index.

    Attributes:
        label_map: k + 1 where row k owns the pixel, 0 for none; the image is the top left part.
        scores, class_scores: of the rows.
        queries: query index of the rows.
    """

    label_map: Int[Array, "b s s"]
    scores: Float[Array, "b q"]
    class_scores: Float[Array, "b q"]
    queries: Int[Array, "b q"]

    def to_predictions(self, originals: Sequence[tuple[int, int]], limit: int | None = None) -> list[EntityPrediction]:
        """Copies to the host and cuts the images, of (height, width) `originals`, out; keeps the first `limit` rows."""
        host = jax.device_get(self)
        rows = slice(None, limit)
        out = []
        for index, (height, width) in enumerate(originals):
            label_map = np.array(host.label_map[index, :height, :width])
            if limit is not None:
                label_map[label_map > limit] = BACKGROUND
            queries = host.queries[index, rows]
            scores, class_scores = host.scores[index, rows], host.class_scores[index, rows]
            columns = {"labels": np.zeros_like(queries), "queries": queries, "class_scores": class_scores}
            out.append(EntityPrediction.of(label_map, scores, **columns))
        return out


@functools.partial(jax.jit, static_argnames=("score_mode", "chunk"))
def paint(
    class_score_bq: Float[Array, "b q"],
    mask_logits_bqthw: Float[Array, "b q t h w"],
    canvas: Canvas,
    *,
    score_mode: ScoreMode = ScoreMode.REFERENCE,
    chunk: int = 2,
) -> Painted:
    """Fuses views and paints entities by descending class score.

    With one view the claim is `logit > 0`, the rule of single-view Mask2Former; with several it is `p > 0.5`.

    Args:
        class_score_bq: probability of being an entity.
        mask_logits_bqthw: mask logits of every query in every view.
        canvas: from `make_canvas`.
        score_mode: see `ScoreMode`.
        chunk: queries per step; larger suits accelerators.
    """

    def one(item):
        class_score, logits_qthw, image = item
        order = jnp.argsort(-class_score, stable=True)
        ranked = class_score[order]
        # Rows and columns then interpolate as plain matrix products.
        logits_thqw = logits_qthw[order].transpose(1, 2, 0, 3)
        label_map, area, quality = _paint_image(logits_thqw, image, score_mode, chunk)
        return Painted(label_map, entity_scores(ranked, quality, area, score_mode), ranked, order)

    # Images one after the other: how many tiles they have, and queries a tile, differs between them.
    return jax.lax.map(one, (class_score_bq, mask_logits_bqthw, canvas))


def _paint_image(logits_thqw, canvas, score_mode, chunk):
    views, _, queries, _ = logits_thqw.shape

    def paint_tile(index, carry):
        label_map, area, quality = carry
        tile = canvas.tile(logits_thqw, index)
        count_yx = tile.cover_tyx.sum(0)
        share = tile.cover_tyx / (count_yx + 1e-16)
        visible = jnp.any(tile.cover_tyx > 0, axis=(1, 2))
        active = jnp.any((tile.patch_thqw.max(axis=(1, 3)) > 0) & visible[:, None], axis=0)
        turn = jnp.argsort(~active, stable=True)  # the active ones first, still by class score
        active_count = active.sum()

        def unfinished(state):
            step, labels, *_ = state
            return (step * chunk < active_count) & jnp.any((labels == _FREE) & (count_yx > 0))

        def advance(state):
            step, labels, area, quality = state
            position = step * chunk + jnp.arange(chunk)
            rank = turn[jnp.minimum(position, queries - 1)]
            logits_tykx = tile.interpolate(rank)
            probability = jnp.sum(jax.nn.sigmoid(logits_tykx) * share[:, :, None], axis=0)
            claims = logits_tykx[0] > 0 if views == 1 else probability > 0.5
            claims &= (position < active_count)[:, None] & ((labels == _FREE) & (count_yx > 0))[:, None]
            claims &= jnp.cumsum(claims, axis=1) == 1  # the first claimant of the chunk
            area = area.at[rank].add(claims.sum((0, 2), dtype=jnp.int32))
            quality = quality.at[rank].add(jnp.where(claims, pixel_quality(probability, score_mode), 0).sum((0, 2)))
            painted = jnp.max(jnp.where(claims, rank[:, None].astype(labels.dtype), _FREE), axis=1)
            return step + 1, jnp.maximum(labels, painted), area, quality

        labels = jnp.full((TILE, TILE), _FREE, jnp.int16)
        _, labels, area, quality = jax.lax.while_loop(unfinished, advance, (0, labels, area, quality))
        return jax.lax.dynamic_update_slice(label_map, labels, tile.corner), area, quality

    label_map = jnp.full((canvas.length, canvas.length), _FREE, jnp.int16)
    start = (label_map, jnp.zeros(queries, jnp.int32), jnp.zeros(queries, jnp.float32))
    owner, area, quality = jax.lax.fori_loop(0, canvas.tiles[0] * canvas.tiles[1], paint_tile, start)
    return owner + 1, area, quality
