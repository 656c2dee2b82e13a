"""Losses of CropFormer and Mask2Former (ESG, Eq. 6-7; Mask2Former, sections 3.2-3.3).

Both levels are the same computation on items that have T views each: at the image level every view is an item of its
own (T = 1), at the batch level an item is an image with all its views.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from esg_jax.ops.matching import match
from esg_jax.ops.point_sample import point_sample, point_sample_features, point_sample_packed
from esg_jax.ops.selection import kth_smallest


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights and number of sampled points; the defaults are the reference's.

    Attributes:
        class_weight, mask_weight, dice_weight: of the three terms, in matching and in the loss.
        no_object_weight: of unmatched queries in the classification loss.
        num_points: points per mask at which mask terms are evaluated.
        oversample_ratio: candidates per point from which the most uncertain are chosen.
        importance_sample_ratio: share of the points chosen so; the others are uniform.
        image_level_factor: on all losses of the image level when there is a batch level (paper: 1).
        shared_points: draw one set of points per image, for all its masks, views, predictions and both levels. Each
            mask still sees uniform candidates, but features sampled once and matrix products replace all sampling of
            masks: several times faster, on TPUs above all. The reference draws points for every mask (False).
    """

    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    no_object_weight: float = 0.1
    num_points: int = 12544
    oversample_ratio: float = 3.0
    importance_sample_ratio: float = 0.75
    image_level_factor: float = 0.5
    shared_points: bool = False

    @property
    def num_candidates(self) -> int:
        return int(self.num_points * self.oversample_ratio)

    @property
    def num_important(self) -> int:
        return int(self.num_points * self.importance_sample_ratio)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Points:
    """Random points of one level, (x, y) in [0, 1]; P predictions, M items, N targets, T views.

    Attributes:
        matching: shared by all masks and views of an item.
        candidates: for importance sampling, per mask and view.
        uniform: the points that are not chosen by importance.
    """

    matching: Float[Array, "p m k 2"]
    candidates: Float[Array, "p m n t c 2"]
    uniform: Float[Array, "p m n t u 2"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Level:
    """What the predictions of one level are compared with; M items, N target slots, T views.

    Attributes:
        features: mask features, at stride 4; with shared points sampled there, (M, T, S, C).
        masks: target masks as packed bits; with shared points their values there, (M, N, T, S).
        labels: class of every target.
        present: which slots hold a target.
        counted: which items are charged for their classes; None: all.
        exhaustive: of which items every entity is a target; the others are not charged for "no object". None: all.
    """

    features: Float[Array, "m t h w c"] | Float[Array, "m t s c"]
    masks: UInt8[Array, "m n t y x8"] | Float[Array, "m n t s"]
    labels: Int[Array, "m n"]
    present: Bool[Array, "m n"]
    counted: Bool[Array, "m"] | None = None
    exhaustive: Bool[Array, "m"] | None = None


def loss_normalizers(batch: Mapping[str, Array], num_queries: int, config: LossConfig) -> dict[str, Array]:
    """Divisors of the losses, which depend on the targets only.

    Gradient accumulation passes those of the whole batch to every micro-batch, so that the sum equals the big batch
    exactly.

    Args:
        batch: needs `present` (B, N) and `valid` (B, N, T), and may have `counted` and `exhaustive` (B,).
        num_queries: of the model.
        config: needs `no_object_weight`.

    Returns:
        For each level ("image", "batch") the number of target masks and the sum of the classification weights.
    """

    def level(count_m, counted_m, exhaustive_m):
        total = jnp.sum(count_m).astype(jnp.float32)
        matched = jnp.minimum(count_m, num_queries).astype(jnp.float32)
        weights = jnp.sum(counted_m * (matched + config.no_object_weight * exhaustive_m * (num_queries - matched)))
        # By chance no image of a batch may count.
        return {"masks": jnp.maximum(total, 1.0), "weights": jnp.where(weights > 0, weights, 1.0)}

    everything = jnp.ones(len(batch["present"]), bool)
    flags = batch.get("counted", everything), batch.get("exhaustive", everything)
    valid = batch["valid"] & batch["present"][..., None]
    # At the batch level an entity counts once, although its masks in all views enter the loss.
    return {
        "image": level(jnp.sum(valid, axis=1).reshape(-1), *(jnp.repeat(flag, valid.shape[2]) for flag in flags)),
        "batch": level(jnp.sum(batch["present"], axis=1), *flags),
    }


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Assignment:
    """Which query each target slot got, see `ops.matching.match`."""

    query: Int[Array, "*p m n"]
    matched: Bool[Array, "*p m n"]


def cropformer_loss(
    output,
    batch: Mapping[str, Array],
    keys: Array,
    config: LossConfig,
    *,
    normalizers: Mapping | None = None,
    points: Mapping[str, Points] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Sum of all losses with deep supervision.

    Args:
        output: a `CropFormerOutput` with all predictions.
        batch: targets: `masks` uint8 (B, N, T, H, W/8) packed bits, `labels` int (B, N), `present` bool (B, N),
            `valid` bool (B, N, T). An image that is not `counted`, bool (B,), must have no target; it costs nothing.
            Of one that is not `exhaustive`, bool (B,), targets are charged, and no query for finding something else.
        keys: one PRNG key per image, (B,); draws the points.
        config: weights.
        normalizers: divisors from `loss_normalizers`; by default those of this batch.
        points: fixed points per level ("image", "batch") instead of random ones.

    Returns:
        The total, and its weighted terms loss_{ce,mask,dice}[_i][_2d|_3d]: i counts predictions from the raw queries
        (0), the final one has no number; 2d is the image level, 3d the batch level, no suffix without batch level.
    """
    total, terms, _ = loss_and_assignment(output, batch, keys, config, normalizers=normalizers, points=points)
    return total, terms


def loss_and_assignment(
    output,
    batch: Mapping[str, Array],
    keys: Array,
    config: LossConfig,
    *,
    normalizers: Mapping | None = None,
    points: Mapping[str, Points] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]], Assignment]:
    """`cropformer_loss`, and the final assignment: of the batch level, or the image level where there is no other."""
    if normalizers is None:
        normalizers = loss_normalizers(batch, output.image.logits.shape[2], config)
    views, num_images = batch["valid"].shape[2], len(batch["present"])
    flags = {name: batch[name] for name in ("counted", "exhaustive") if name in batch}
    features, masks = output.mask_features, batch["masks"]
    if config.shared_points:
        features, masks = _sample_shared(features, masks, keys, config)
    view_keys = jax.vmap(lambda key: jax.random.split(key, views + 1))(keys)  # the last one is for the batch level

    def per_view(x_bnt):
        """(B, N, T, ...) -> (B*T, N, ...)."""
        return jnp.moveaxis(x_bnt, 2, 1).reshape(num_images * views, x_bnt.shape[1], *x_bnt.shape[3:])

    image_level = Level(
        features=features.reshape(-1, 1, *features.shape[2:]),
        masks=per_view(masks)[:, :, None],
        labels=jnp.repeat(batch["labels"], views, axis=0),
        present=per_view(batch["valid"] & batch["present"][..., None]),
        **{name: jnp.repeat(flag, views) for name, flag in flags.items()},
    )
    levels = {"image": (output.image, image_level, view_keys[:, :-1].reshape(-1), "_2d", config.image_level_factor)}
    if output.batch is None:
        levels["image"] = (*levels["image"][:3], "", 1.0)
    else:
        batch_level = Level(features, masks, batch["labels"], batch["present"], **flags)
        levels["batch"] = (output.batch, batch_level, view_keys[:, -1], "_3d", 1.0)

    terms = {}
    for name, (decoder, level, level_keys, suffix, factor) in levels.items():
        fixed = None if points is None else points[name]
        values, assignments = _level_losses(decoder, level, level_keys, config, normalizers[name], fixed)
        last = len(decoder.logits) - 1
        for term, weight in (("ce", config.class_weight), ("mask", config.mask_weight), ("dice", config.dice_weight)):
            for index in range(last + 1):
                number = "" if index == last else f"_{index}"
                terms[f"loss_{term}{number}{suffix}"] = factor * weight * values[term][index]
    return sum(terms.values()), terms, jax.tree.map(lambda x: x[-1], assignments)


def _level_losses(
    decoder, level: Level, keys, config, normalizers, fixed: Points | None
) -> tuple[dict[str, Array], Assignment]:
    """Unweighted terms of every prediction of a level, each (P,), and the P assignments."""
    select = _select_shared if config.shared_points else _select_per_mask

    def one(carry, prediction):
        index, logits, mask_embed, points = prediction
        if points is None and not config.shared_points:
            item_keys = jax.vmap(lambda key: jax.random.fold_in(key, index))(keys)
            points = draw_points(item_keys, level.masks.shape[1:3], config)
        frozen = jax.lax.stop_gradient((logits, mask_embed, level))
        chosen = select(*frozen, points, config)
        # Recomputed in the backward pass: memory holds the masks of one prediction. The choices above are kept.
        terms = jax.checkpoint(_terms, static_argnums=(4,))(logits, mask_embed, level, chosen, config, normalizers)
        return carry, (terms, Assignment(chosen.query, chosen.matched))

    indices = jnp.arange(len(decoder.logits))
    return jax.lax.scan(one, None, (indices, decoder.logits, decoder.mask_embed, fixed))[1]


def draw_points(keys: Array, targets_and_views: tuple[int, int], config: LossConfig) -> Points:
    """Uniform points for the items with the given keys, without the leading axis of predictions."""

    def draw(key):
        first, second, third = jax.random.split(key, 3)
        return Points(
            matching=jax.random.uniform(first, (config.num_points, 2)),
            candidates=jax.random.uniform(second, (*targets_and_views, config.num_candidates, 2)),
            uniform=jax.random.uniform(third, (*targets_and_views, config.num_points - config.num_important, 2)),
        )

    return jax.vmap(draw)(keys)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Choice:
    """What a prediction is charged for: no gradient flows through it.

    query, matched: the assignment, see `ops.matching.match`.
    points: per mask (M, N, T, K, 2); with shared points which of them count, (M, N, T, S).
    """

    query: Int[Array, "m n"]
    matched: Bool[Array, "m n"]
    points: Array


def _terms(logits_mqk, mask_embed_mqc, level: Level, choice: _Choice, config, normalizers) -> dict[str, Array]:
    """Unweighted classification, mask and dice terms of one prediction."""
    # Slots without a target use query 0 here and are masked out below.
    embed_mnc = jnp.take_along_axis(mask_embed_mqc, choice.query[..., None], axis=1)
    if config.shared_points:
        logits = jnp.einsum("mnc,mtsc->mnts", embed_mnc, level.features)
        target, weight = level.masks, choice.points.astype(jnp.float32)
    else:
        # Masks of matched queries only.
        maps = jnp.einsum("mnc,mthwc->mnthw", embed_mnc, level.features)
        logits, target = point_sample(maps, choice.points), point_sample_packed(level.masks, choice.points)
        weight = jnp.float32(1)
    bce = jnp.sum((jax.nn.softplus(logits) - logits * target) * weight, axis=-1) / config.num_points
    probability, target = jax.nn.sigmoid(logits) * weight, target * weight
    overlap, total = jnp.sum(probability * target, axis=-1), jnp.sum(probability, axis=-1) + jnp.sum(target, axis=-1)
    dice = 1 - (2 * overlap + 1) / (total + 1)
    keep = choice.matched[..., None]
    return {
        "ce": _classification(logits_mqk, level, choice, config) / normalizers["weights"],
        "mask": jnp.sum(jnp.where(keep, bce, 0.0)) / normalizers["masks"],
        "dice": jnp.sum(jnp.where(keep, dice, 0.0)) / normalizers["masks"],
    }


def _classification(logits_mqk, level: Level, choice: _Choice, config) -> Float[Array, ""]:
    """Weighted sum of cross entropies: the label of the matched target, no-object for all other queries."""
    items, queries, classes = logits_mqk.shape
    slots = jnp.where(choice.matched, choice.query, queries)  # out of bounds, which is dropped
    label = jnp.full((items, queries), classes - 1).at[jnp.arange(items)[:, None], slots].set(level.labels, mode="drop")
    negative = -jnp.take_along_axis(jax.nn.log_softmax(logits_mqk), label[..., None], axis=-1)[..., 0]
    no_object = config.no_object_weight * (1.0 if level.exhaustive is None else level.exhaustive[:, None])
    weight = jnp.where(label == classes - 1, no_object, 1.0)
    return jnp.sum(negative * (weight if level.counted is None else weight * level.counted[:, None]))


def _select_per_mask(logits_mqk, mask_embed_mqc, level: Level, points: Points, config) -> _Choice:
    """The reference's procedure: matching at points of the item, importance sampling at points of every mask.

    Mask logits at a matching point are the embedding times the features sampled there, so one gather of features
    serves all queries.
    """
    items, targets, views = level.masks.shape[:3]
    samples = points.matching.shape[1]
    shared = jnp.broadcast_to(points.matching[:, None], (items, views, samples, 2))
    features = point_sample_features(level.features, shared).reshape(items, views * samples, -1)
    shared = jnp.broadcast_to(shared[:, None], (items, targets, views, samples, 2))
    target = point_sample_packed(level.masks, shared).reshape(items, targets, views * samples)
    query, matched = _match(logits_mqk, mask_embed_mqc, features, target, level, config)
    if config.num_important == 0:
        return _Choice(query, matched, points.uniform)
    maps = jnp.einsum("mnc,mthwc->mnthw", jnp.take_along_axis(mask_embed_mqc, query[..., None], 1), level.features)
    uncertainty = -jnp.abs(point_sample(maps, points.candidates))
    _, index = jax.lax.top_k(uncertainty, config.num_important)
    important = jnp.take_along_axis(points.candidates, index[..., None], axis=-2)
    return _Choice(query, matched, jnp.concatenate([important, points.uniform], axis=-2))


def _sample_shared(features_bthwc, masks_bntyx, keys, config):
    """Features and target values at the points that all masks of an image share, candidates before uniform ones."""
    batch, views = features_bthwc.shape[:2]
    count = config.num_candidates + config.num_points - config.num_important
    points = jax.vmap(lambda key: jax.random.uniform(key, (count, 2)))(keys)
    points = jnp.broadcast_to(points[:, None], (batch, views, count, 2))
    features = point_sample_features(features_bthwc, points)
    points = jnp.broadcast_to(points[:, None], (*masks_bntyx.shape[:3], count, 2))
    return features, point_sample_packed(masks_bntyx, points)


def _select_shared(logits_mqk, mask_embed_mqc, level: Level, _, config) -> _Choice:
    """Matching at all shared points; per mask, the most uncertain candidates and the uniform points count."""
    items, views, samples, channels = level.features.shape
    features = level.features.reshape(items, views * samples, channels)
    target = level.masks.reshape(*level.masks.shape[:2], -1)
    query, matched = _match(logits_mqk, mask_embed_mqc, features, target, level, config)
    embed = jnp.take_along_axis(mask_embed_mqc, query[..., None], axis=1)
    uniform = jnp.ones((*level.masks.shape[:3], config.num_points - config.num_important), bool)
    if config.num_important == 0:
        return _Choice(query, matched, jnp.pad(uniform, [(0, 0)] * 3 + [(config.num_candidates, 0)]))
    logits = jnp.einsum("mnc,mtsc->mnts", embed, level.features[:, :, : config.num_candidates])
    certainty = jnp.abs(logits)
    important = certainty <= kth_smallest(certainty, config.num_important)
    return _Choice(query, matched, jnp.concatenate([important, uniform], axis=-1))


def _match(logits_mqk, mask_embed_mqc, features_msc, target_mns, level: Level, config):
    """Assigns targets to queries by class probability, BCE and dice at sampled points."""
    logits = jnp.einsum("mqc,msc->mqs", mask_embed_mqc, features_msc)
    # softplus(-x) t + softplus(x) (1 - t) = softplus(x) - x t
    bce = jnp.sum(jax.nn.softplus(logits), axis=-1)[..., None] - jnp.einsum("mqs,mns->mqn", logits, target_mns)
    probability = jax.nn.sigmoid(logits)
    overlap = jnp.einsum("mqs,mns->mqn", probability, target_mns)
    total = jnp.sum(probability, axis=-1)[..., None] + jnp.sum(target_mns, axis=-1)[:, None]
    dice = 1 - (2 * overlap + 1) / (total + 1)
    classes = jnp.broadcast_to(level.labels[:, None], (*logits_mqk.shape[:2], level.labels.shape[1]))
    class_probability = jnp.take_along_axis(jax.nn.softmax(logits_mqk), classes, axis=-1)
    cost = config.mask_weight * bce / logits.shape[-1] + config.dice_weight * dice
    return match(cost - config.class_weight * class_probability, level.present)
