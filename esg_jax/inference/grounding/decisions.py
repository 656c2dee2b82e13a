"""From scores of (noun, entity) pairs to masks of nouns: the decisions of every task, in plain numpy.

S[i, e] is the probability that noun i means entity e; an entity that the model could not find again among its queries
has the score 0 everywhere.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment


@dataclasses.dataclass(frozen=True)
class GroundingConfig:
    """Thresholds and modes; the paper names none of them.

    Attributes:
        match_iou: a query speaks for an input entity when their masks overlap at least this much.
        threshold: a noun means every entity with a larger score.
        min_score: where there is none, the best entity, when its score is larger; else the noun is not found.
        plural_threshold: as `threshold`, for phrases known to be plural (0.1 as in the PNG baseline).
        refer_mode: "whole" takes a referring expression as one noun; "extract" lets the model list its nouns.
        refer_select: with "extract", the noun that speaks for the expression: "max_score" or "first".
        refer_merge: "none", or "threshold": also all entities above `merge_ratio` times the best score.
        empty_score: a question whose best entity has no larger score is answered with no mask.
        panoptic_score: entities with a smaller score times entityness are left out.
        class_names_per_prompt: longer lists of categories are asked in several sentences.
        order_averages: category lists are asked in this many random orders and averaged; 1 keeps the given order.
        classes_per_entity, max_instances: of instance prediction.
        output_masks: "input" (the given masks, exact outlines) or "reconstructed" (the model's own).
        colorings: scores are averaged over this many random colourings of the entities.
    """

    match_iou: float = 0.5
    threshold: float = 0.5
    min_score: float = 0.1
    plural_threshold: float = 0.1
    refer_mode: str = "whole"
    refer_select: str = "max_score"
    refer_merge: str = "none"
    merge_ratio: float = 0.5
    empty_score: float = 0.1
    panoptic_score: float = 0.25
    class_names_per_prompt: int = 150
    order_averages: int = 1
    classes_per_entity: int = 3
    max_instances: int = 100
    output_masks: str = "input"
    colorings: int = 1

    def __post_init__(self):
        choices = {
            "refer_mode": ("whole", "extract"),
            "refer_select": ("max_score", "first"),
            "refer_merge": ("none", "threshold"),
            "output_masks": ("input", "reconstructed"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is float and not (isinstance(value, int | float) and 0 <= value <= 1):
                raise ValueError(f"{field.name} is {value}; it must lie between 0 and 1")
            if field.type is int and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{field.name} is {value}; it must be a positive whole number")


def read_rules(pairs: Sequence[str], option: str) -> dict[str, Any]:
    """Fields of `GroundingConfig` from texts NAME=VALUE; numbers become numbers.

    Raises:
        ValueError: no "=" in one; names the option.
    """
    out: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{option} {pair!r}: expected NAME=VALUE")
        try:
            out[name] = json.loads(value)
        except json.JSONDecodeError:
            out[name] = value
    return out


def match_queries(iou_qn: Float[np.ndarray, "q n"], min_iou: float = 0.5) -> Int[np.ndarray, "n"]:
    """The query of every input entity, -1 where none overlaps enough: the one-to-one matching of largest total IoU."""
    rows, columns = linear_sum_assignment(iou_qn, maximize=True)
    query_n = np.full(iou_qn.shape[1], -1)
    good = iou_qn[rows, columns] >= min_iou
    query_n[columns[good]] = rows[good]
    return query_n


def entity_scores(logits_vq: Float[np.ndarray, "v q"], query_n: Int[np.ndarray, "n"]) -> Float[np.ndarray, "v n"]:
    """S: sigmoid of the association logits of every entity's query; 0 for entities without one."""
    logits_vn = np.asarray(logits_vq, np.float64)[:, np.maximum(query_n, 0)]
    scores = np.where(logits_vn >= 0, 1 / (1 + np.exp(-np.abs(logits_vn))), 1 - 1 / (1 + np.exp(-np.abs(logits_vn))))
    return np.where(query_n >= 0, scores, 0.0).astype(np.float32)


def entities_of_noun(scores_n: Float[np.ndarray, "n"], config: GroundingConfig) -> Int[np.ndarray, "m"]:
    """Entities of one noun of a caption, best first: all above `threshold`, else the best above `min_score`."""
    return _above(scores_n, config.threshold, config.min_score)


def entities_of_phrase(scores_n: Float[np.ndarray, "n"], plural: bool, config: GroundingConfig) -> Int[np.ndarray, "m"]:
    """Entities of a phrase known to be singular (the best one) or plural (all above `plural_threshold`, else the best).

    For evaluation: like the baselines of panoptic narrative grounding it always answers.
    """
    if not plural:
        return _best(scores_n, 0.0)
    return _above(scores_n, config.plural_threshold, 0.0)


def entities_of_expression(
    scores_vn: Float[np.ndarray, "v n"], config: GroundingConfig
) -> tuple[int | None, Int[np.ndarray, "m"]]:
    """The noun that speaks for a referring expression, and its entities; None and nothing when not found."""
    if not scores_vn.size:
        return None, np.zeros(0, int)
    noun = int(scores_vn.max(axis=1).argmax()) if config.refer_select == "max_score" else 0
    best = _best(scores_vn[noun], config.min_score)
    if len(best) and config.refer_merge == "threshold":
        limit = config.merge_ratio * scores_vn[noun, best[0]]
        best = _above(scores_vn[noun], float(limit), float(limit))
    return (noun if len(best) else None), best


def entities_of_question(scores_n: Float[np.ndarray, "n"], config: GroundingConfig) -> Int[np.ndarray, "m"]:
    """Entities that answer a question: all above `threshold`, else the best, none when it is below `empty_score`."""
    return _above(scores_n, config.threshold, config.empty_score)


def _above(scores_n: np.ndarray, threshold: float, otherwise: float) -> np.ndarray:
    chosen = np.flatnonzero(scores_n > threshold)
    if not len(chosen):
        return _best(scores_n, otherwise)
    return chosen[np.argsort(-scores_n[chosen], kind="stable")]


def _best(scores_n: np.ndarray, above: float) -> np.ndarray:
    if not len(scores_n) or not scores_n.max() > above:
        return np.zeros(0, int)
    return np.array([scores_n.argmax()])


@dataclasses.dataclass(frozen=True)
class ClassSegment:
    """Entities of one class: one countable thing, or all of a class of stuff."""

    category: int
    entities: tuple[int, ...]
    score: float


def panoptic_segments(
    scores_kn: Float[np.ndarray, "k n"],
    entityness_n: Float[np.ndarray, "n"],
    is_thing_k: Bool[np.ndarray, "k"],
    config: GroundingConfig,
) -> list[ClassSegment]:
    """Every entity gets its best class; uncertain ones are left out, and stuff of one class is one segment.

    The input masks are disjoint, so the overlap test of panoptic merging never removes any.

    Returns:
        Segments, best score first.
    """
    if not scores_kn.size:
        return []
    classes, scores = scores_kn.argmax(axis=0), scores_kn.max(axis=0) * entityness_n
    order = np.argsort(-scores, kind="stable")
    segments: dict[tuple, ClassSegment] = {}
    for entity in order[scores[order] >= config.panoptic_score].tolist():
        category = int(classes[entity])
        key = (category, entity) if is_thing_k[category] else (category,)
        known = segments.get(key)
        if known is None:
            segments[key] = ClassSegment(category, (entity,), float(scores[entity]))
        else:
            segments[key] = dataclasses.replace(known, entities=(*known.entities, entity))
    return list(segments.values())


def instances(
    scores_kn: Float[np.ndarray, "k n"], entityness_n: Float[np.ndarray, "n"], config: GroundingConfig
) -> list[ClassSegment]:
    """The best classes of every entity as scored instances, best first."""
    if not scores_kn.size:
        return []
    scores = scores_kn * entityness_n
    top = np.argsort(-scores, axis=0, kind="stable")[: config.classes_per_entity]
    pairs = [(float(scores[k, e]), int(k), e) for e in range(scores.shape[1]) for k in top[:, e] if scores[k, e] > 0]
    pairs.sort(key=lambda pair: -pair[0])
    return [ClassSegment(category, (entity,), score) for score, category, entity in pairs[: config.max_instances]]


def category_lists(count: int, config: GroundingConfig, seed: int = 0) -> list[list[Int[np.ndarray, "m"]]]:
    """Which categories are asked together and in which order.

    Returns:
        One list of chunks for every order that is averaged; the first order is the given one.
    """
    rng = np.random.default_rng(seed)
    orders = [np.arange(count)] + [rng.permutation(count) for _ in range(config.order_averages - 1)]
    chunks = -(-count // config.class_names_per_prompt)
    return [np.array_split(order, chunks) for order in orders]


def clean_name(name: str) -> str:
    """A category name as text: "floor-other-merged" -> "floor", "0-cell_phone" -> "cell phone"."""
    name = re.sub(r"^\d+[-_ ]+", "", name.strip())
    name = re.sub(r"-(other|merged|stuff)\b", "", name)
    return re.sub(r"[-_\s]+", " ", name).strip().lower()


def distinct_names(names: Sequence[str]) -> list[str]:
    """Cleaned names.

    Raises:
        ValueError: no names, an empty one, or two that are equal after cleaning (they could not be told apart).
    """
    cleaned = [clean_name(name) for name in names]
    if not cleaned:
        raise ValueError("no category names")
    for position, name in enumerate(cleaned):
        if not name:
            raise ValueError(f"category name {position + 1} is empty")
        if name in cleaned[:position]:
            raise ValueError(f"category {names[position]!r} and {names[cleaned.index(name)]!r} are both {name!r}")
    return cleaned
