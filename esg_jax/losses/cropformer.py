"""Losses of CropFormer and Mask2Former (ESG, Eq. 6-7; Mask2Former, sections 3.2-3.3).

Both levels are the same computation on the views of all images: at the image level every view is matched by itself, at
the batch level the matching costs of an image's views are added up first. One scan goes over the predictions of both.
"""

import dataclasses
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from esg_jax.ops.matching import match
from esg_jax.ops.point_sample import point_sample, point_sample_features, point_sample_packed
from esg_jax.ops.random import uniform
from esg_jax.ops.selection import kth_smallest, smallest


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
class Units:
    """What predictions are compared with: U = B * T units, the views of all images; N target slots each.

    Attributes:
        features: mask features, at stride 4; with shared points sampled there, (U, S, C).
        masks: target masks as packed bits; with shared points their values there, (U, N, S).
        labels: class of every target.
        counted: which units are charged for their classes; None: all.
        exhaustive: of which units every entity is a target; the others are not charged for "no object". None: all.
        views: T.
    """

    features: Float[Array, "u h w c"] | Float[Array, "u s c"]
    masks: UInt8[Array, "u n y x8"] | Float[Array, "u n s"]
    labels: Int[Array, "u n"]
    counted: Bool[Array, "u"] | None
    exhaustive: Bool[Array, "u"] | None
    views: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prediction:
    """One prediction for all units.

    Attributes:
        index: its number, which decides its random points.
        joint: whether the views of an image are matched together (batch level); then they have the same queries.
        present: which slots hold a target at this level.
        points: matching points (U, S, 2) and candidates before uniform ones (U, N, K, 2), or None: drawn.
    """

    index: Int[Array, ""]
    joint: Bool[Array, ""]
    logits: Float[Array, "u q k"]
    mask_embed: Float[Array, "u q c"]
    present: Bool[Array, "u n"]
    points: tuple[Array, Array] | None


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
    present, valid = batch["present"], batch["valid"]
    views = valid.shape[2]

    def per_unit(x_bnt):
        """(B, N, T, ...) -> (B*T, N, ...)."""
        return jnp.moveaxis(x_bnt, 2, 1).reshape(-1, x_bnt.shape[1], *x_bnt.shape[3:])

    select = _select_shared if config.shared_points else _select_per_mask
    features, masks = output.mask_features, batch["masks"]
    if config.shared_points:
        features, masks = _sample_shared(features, masks, keys, config)
    units = Units(
        features=features.reshape(-1, *features.shape[2:]),
        masks=per_unit(masks),
        labels=jnp.repeat(batch["labels"], views, axis=0),
        **{name: jnp.repeat(batch[name], views) if name in batch else None for name in ("counted", "exhaustive")},
        views=views,
    )
    # One program serves the predictions of both levels: the image level's, then the batch level's for each view.
    last = len(output.image.logits) - 1
    logits, embed = output.image.logits, output.image.mask_embed
    here = jnp.broadcast_to(per_unit(valid & present[..., None]), (last + 1, len(logits[0]), present.shape[1]))
    levels = {
        "image": ("" if output.batch is None else "_2d", 1.0 if output.batch is None else config.image_level_factor)
    }
    if output.batch is not None:
        levels["batch"] = ("_3d", 1.0)
        logits = jnp.concatenate([logits, jnp.repeat(output.batch.logits, views, axis=1)])
        embed = jnp.concatenate([embed, jnp.repeat(output.batch.mask_embed, views, axis=1)])
        everywhere = jnp.broadcast_to(jnp.repeat(present, views, axis=0), here.shape)
        here = jnp.concatenate([here, everywhere])
    count = len(logits)
    predictions = Prediction(
        index=jnp.arange(count),
        joint=jnp.arange(count) > last,
        logits=logits,
        mask_embed=embed,
        present=here,
        points=None if points is None else _fixed_points(points, levels),
    )

    def one(carry, prediction):
        drawn = prediction
        if points is None and not config.shared_points:
            drawn = dataclasses.replace(
                prediction, points=draw_points(keys, prediction.index, prediction.joint, masks.shape[1:3], config)
            )
        chosen = select(*jax.lax.stop_gradient((drawn, units)), config)
        # Recomputed in the backward pass: memory holds the masks of one prediction. The choices above are kept.
        terms = jax.checkpoint(_terms, static_argnums=3)(prediction, units, chosen, config)
        return carry, (terms, Assignment(chosen.query, chosen.matched))

    values, assignment = jax.lax.scan(one, None, predictions)[1]  # values: (2P, 3)
    weights = np.array([config.class_weight, config.mask_weight, config.dice_weight])
    scale = []
    for name, (_, factor) in levels.items():
        # The batch level's classes are charged once in every view.
        share = views if name == "batch" else 1
        divisors = jnp.stack([normalizers[name]["weights"] * share, *[normalizers[name]["masks"]] * 2])
        scale += [factor * weights / divisors] * (last + 1)
    values = values * jnp.stack(scale)
    terms = {}
    for level, (suffix, _) in enumerate(levels.values()):
        for column, term in enumerate(("ce", "mask", "dice")):
            for index in range(last + 1):
                number = "" if index == last else f"_{index}"
                terms[f"loss_{term}{number}{suffix}"] = values[level * (last + 1) + index, column]
    # At the batch level every view of an image has the same assignment.
    step = 1 if output.batch is None else views
    return jnp.sum(values), terms, jax.tree.map(lambda x: x[-1, ::step], assignment)


def _fixed_points(points: Mapping[str, Points], levels: Iterable[str]) -> tuple[Array, Array]:
    """Given points of all levels as those of predictions of units."""
    matching, scattered = [], []
    for name in levels:
        given = points[name]
        matching.append(jnp.repeat(given.matching, given.candidates.shape[3], axis=1))  # T: 1 at the image level
        both = jnp.concatenate([given.candidates, given.uniform], axis=-2)
        both = jnp.moveaxis(both, 3, 2)  # (P, M, T, N, K, 2)
        scattered.append(both.reshape(len(both), -1, *both.shape[3:]))
    return jnp.concatenate(matching), jnp.concatenate(scattered)


def draw_points(keys: Array, index, joint, targets_and_views: tuple[int, int], config: LossConfig):
    """Uniform points of one prediction: for matching (U, S, 2), and of every mask, candidates first, (U, N, K, 2).

    Args:
        keys: one per image.
        index: number of the prediction.
        joint: whether all views of an image share the matching points.
        targets_and_views: N, T.
        config: numbers of points.
    """
    targets, views = targets_and_views
    per_mask = config.num_candidates + config.num_points - config.num_important
    shapes = (views, config.num_points, 2), (views, targets, per_mask, 2)
    matching = uniform(keys, shapes[0], 2 * index)
    matching = jnp.where(joint, matching[:, :1], matching)
    scattered = uniform(keys, shapes[1], 2 * index + 1)
    return matching.reshape(-1, *shapes[0][1:]), scattered.reshape(-1, *shapes[1][1:])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Choice:
    """What a prediction is charged for: no gradient flows through it.

    query, matched: the assignment, see `ops.matching.match`.
    points: per mask (U, N, K, 2); with shared points which of them count, (U, N, S).
    """

    query: Int[Array, "u n"]
    matched: Bool[Array, "u n"]
    points: Array


def _terms(prediction: Prediction, units: Units, choice: _Choice, config) -> Float[Array, "3"]:
    """Sums over all units of the classification, mask and dice terms of one prediction."""
    # Slots without a target use query 0 here and are masked out below.
    embed_unc = jnp.take_along_axis(prediction.mask_embed, choice.query[..., None], axis=1)
    if config.shared_points:
        logits = jnp.einsum("unc,usc->uns", embed_unc, units.features)
        target, weight = units.masks, choice.points.astype(jnp.float32)
    else:
        # Masks of matched queries only.
        maps = jnp.einsum("unc,uhwc->unhw", embed_unc, units.features)
        logits, target = point_sample(maps, choice.points), point_sample_packed(units.masks, choice.points)
        weight = jnp.float32(1)
    bce = jnp.sum((jax.nn.softplus(logits) - logits * target) * weight, axis=-1) / config.num_points
    probability, target = jax.nn.sigmoid(logits) * weight, target * weight
    overlap, total = jnp.sum(probability * target, axis=-1), jnp.sum(probability + target, axis=-1)
    dice = 1 - (2 * overlap + 1) / (total + 1)
    masks = jnp.sum(jnp.where(choice.matched, jnp.stack([bce, dice]), 0.0), axis=(1, 2))
    return jnp.concatenate([_classification(prediction.logits, units, choice, config)[None], masks])


def _classification(logits_uqk, units: Units, choice: _Choice, config) -> Float[Array, ""]:
    """Weighted sum of cross entropies: the label of the matched target, no-object for all other queries."""
    _, queries, classes = logits_uqk.shape
    # (U, Q, N): whether a query belongs to a slot, at most one.
    own = choice.matched[:, None] & (choice.query[:, None] == jnp.arange(queries)[:, None])
    label = jnp.where(jnp.any(own, -1), jnp.sum(own * units.labels[:, None], -1), classes - 1)
    no_object = config.no_object_weight * (1.0 if units.exhaustive is None else units.exhaustive[:, None])
    weight = jnp.where(label == classes - 1, no_object, 1.0)
    if units.counted is not None:
        weight = weight * units.counted[:, None]
    picked = weight[..., None] * (label[..., None] == jnp.arange(classes))
    return -jnp.sum(picked * jax.nn.log_softmax(logits_uqk))


def _select_per_mask(prediction: Prediction, units: Units, config) -> _Choice:
    """The reference's procedure: matching at points of the item, importance sampling at points of every mask.

    Mask logits at a matching point are the embedding times the features sampled there, so one gather of features
    serves all queries.
    """
    matching, scattered = prediction.points
    features = point_sample_features(units.features, matching)
    shared = jnp.broadcast_to(matching[:, None], (*units.masks.shape[:2], *matching.shape[1:]))
    query, matched = _match(prediction, features, point_sample_packed(units.masks, shared), units, config)
    if config.num_important == 0:
        return _Choice(query, matched, scattered[:, :, config.num_candidates :])
    embed = jnp.take_along_axis(prediction.mask_embed, query[..., None], 1)
    maps = jnp.einsum("unc,uhwc->unhw", embed, units.features)
    certainty = jnp.abs(point_sample(maps, scattered[:, :, : config.num_candidates]))
    index = smallest(certainty, config.num_important)
    rest = jnp.arange(config.num_candidates, scattered.shape[2], dtype=jnp.int32)
    index = jnp.concatenate([index, jnp.broadcast_to(rest, (*index.shape[:2], len(rest)))], axis=-1)
    return _Choice(query, matched, jnp.take_along_axis(scattered, index[..., None], axis=-2))


def _sample_shared(features_bthwc, masks_bntyx, keys, config):
    """Features and target values at the points that all masks of an image share, candidates before uniform ones."""
    batch, views = features_bthwc.shape[:2]
    count = config.num_candidates + config.num_points - config.num_important
    points = uniform(keys, (count, 2))
    features = point_sample_features(features_bthwc, jnp.broadcast_to(points[:, None], (batch, views, count, 2)))
    points = jnp.broadcast_to(points[:, None, None], (*masks_bntyx.shape[:3], count, 2))
    return features, point_sample_packed(masks_bntyx, points)


def _select_shared(prediction: Prediction, units: Units, config) -> _Choice:
    """Matching at all shared points; per mask, the most uncertain candidates and the uniform points count."""
    query, matched = _match(prediction, units.features, units.masks, units, config)
    embed = jnp.take_along_axis(prediction.mask_embed, query[..., None], axis=1)
    uniform_ones = jnp.ones((*units.masks.shape[:2], config.num_points - config.num_important), bool)
    if config.num_important == 0:
        return _Choice(query, matched, jnp.pad(uniform_ones, [(0, 0)] * 2 + [(config.num_candidates, 0)]))
    certainty = jnp.abs(jnp.einsum("unc,usc->uns", embed, units.features[:, : config.num_candidates]))
    important = certainty <= kth_smallest(certainty, config.num_important)
    return _Choice(query, matched, jnp.concatenate([important, uniform_ones], axis=-1))


def _match(prediction: Prediction, features_usc, target_uns, units: Units, config):
    """Assigns targets to queries by class probability, BCE and dice at sampled points."""
    logits = jnp.einsum("uqc,usc->uqs", prediction.mask_embed, features_usc)
    queries, samples = logits.shape[1:]
    # All sums over points as one product of {softplus, logits, probabilities, 1} with {targets, 1}.
    left = jnp.concatenate(
        [jax.nn.softplus(logits), logits, jax.nn.sigmoid(logits), jnp.ones_like(logits[:, :1])], axis=1
    )
    right = jnp.concatenate([target_uns, jnp.ones_like(target_uns[:, :1])], axis=1)
    sums = jnp.einsum("uls,urs->ulr", left, right, precision=jax.lax.Precision.HIGHEST)
    if units.views > 1:
        image = sums.reshape(-1, units.views, *sums.shape[1:])
        image = jnp.broadcast_to(jnp.sum(image, axis=1, keepdims=True), image.shape).reshape(sums.shape)
        sums = jnp.where(prediction.joint, image, sums)
    soft, logit, probability, one = (sums[:, i * queries : (i + 1) * queries] for i in range(4))
    # softplus(-x) t + softplus(x) (1 - t) = softplus(x) - x t
    bce = (soft[..., -1:] - logit[..., :-1]) / one[..., -1:]
    dice = 1 - (2 * probability[..., :-1] + 1) / (probability[..., -1:] + one[..., :-1] + 1)
    # (U, Q, N): probability of every target's class.
    one_hot = (units.labels[..., None] == jnp.arange(prediction.logits.shape[-1])).astype(jnp.float32)
    chance = jnp.einsum("uqk,unk->uqn", jax.nn.softmax(prediction.logits), one_hot, precision=jax.lax.Precision.HIGHEST)
    cost = config.mask_weight * bce + config.dice_weight * dice - config.class_weight * chance
    return match(cost, prediction.present)
