"""Decisions on hand-made scores."""

import re

import numpy as np
import pytest

from esg_jax.inference.grounding.decisions import (
    ClassSegment,
    GroundingConfig,
    category_lists,
    clean_name,
    distinct_names,
    entities_of_expression,
    entities_of_noun,
    entities_of_phrase,
    entities_of_question,
    entity_scores,
    instances,
    match_queries,
    panoptic_segments,
)

DEFAULT = GroundingConfig()


def test_queries_are_matched_to_entities():
    iou = np.array([[0.9, 0.8, 0.0], [0.85, 0.1, 0.0], [0.0, 0.0, 0.4]])
    # One-to-one: query 1 leaves entity 0 to nobody better, so query 0 takes entity 1; entity 2 overlaps too little.
    assert match_queries(iou).tolist() == [1, 0, -1]
    assert match_queries(iou, 0.3).tolist() == [1, 0, 2]
    assert match_queries(np.zeros((1, 3))).tolist() == [-1, -1, -1]


def test_scores_of_entities():
    logits = np.array([[0.0, 2.0, -2.0, 100.0, -1000.0]])
    scores = entity_scores(logits, np.array([2, -1, 1, 4, 3]))
    np.testing.assert_allclose(scores, [[1 / (1 + np.e**2), 0, 1 / (1 + np.e**-2), 0, 1]], atol=1e-6)


@pytest.mark.parametrize(
    ("scores", "noun", "question"),
    [
        ([0.6, 0.2, 0.9], [2, 0], [2, 0]),  # all above the threshold, best first
        ([0.3, 0.4, 0.2], [1], [1]),  # else the best
        ([0.05, 0.1, 0.02], [], []),  # not found
        ([], [], []),
    ],
)
def test_nouns_and_questions(scores, noun, question):
    scores = np.array(scores)
    assert entities_of_noun(scores, DEFAULT).tolist() == noun
    assert entities_of_question(scores, DEFAULT).tolist() == question
    strict = GroundingConfig(empty_score=0.5)
    assert entities_of_question(np.array([0.3]), strict).tolist() == []


def test_phrases_of_known_number():
    scores = np.array([0.6, 0.2, 0.9, 0.01])
    assert entities_of_phrase(scores, False, DEFAULT).tolist() == [2]
    assert entities_of_phrase(scores, True, DEFAULT).tolist() == [2, 0, 1]
    assert entities_of_phrase(scores / 100, True, DEFAULT).tolist() == [2]  # evaluation always answers


def test_referring_expressions():
    scores = np.array([[0.2, 0.3, 0.0], [0.1, 0.7, 0.4]])
    noun, chosen = entities_of_expression(scores, DEFAULT)
    assert (noun, chosen.tolist()) == (1, [1])
    noun, chosen = entities_of_expression(scores, GroundingConfig(refer_select="first"))
    assert (noun, chosen.tolist()) == (0, [1])
    _, chosen = entities_of_expression(scores, GroundingConfig(refer_merge="threshold"))
    assert chosen.tolist() == [1, 2]
    noun, chosen = entities_of_expression(scores / 10, DEFAULT)
    assert (noun, chosen.tolist()) == (None, [])
    assert entities_of_expression(np.zeros((0, 3)), DEFAULT)[0] is None


def test_panoptic_merges_stuff_and_drops_the_uncertain():
    scores = np.array([[0.9, 0.1, 0.2, 0.0], [0.2, 0.8, 0.6, 0.3], [0.0, 0.0, 0.0, 0.2]])
    entityness = np.array([1.0, 0.5, 1.0, 0.5])
    stuff, thing = np.array([True, False, True]), np.array([True, True, True])
    segments = panoptic_segments(scores, entityness, stuff, DEFAULT)
    assert [(s.category, s.entities) for s in segments] == [(0, (0,)), (1, (2, 1))]
    np.testing.assert_allclose([s.score for s in segments], [0.9, 0.6])
    segments = panoptic_segments(scores, entityness, thing, DEFAULT)
    assert [(s.category, s.entities) for s in segments] == [(0, (0,)), (1, (2,)), (1, (1,))]
    assert panoptic_segments(np.zeros((3, 0)), np.zeros(0), stuff, DEFAULT) == []


def test_instances_are_ranked_and_limited():
    scores = np.array([[0.9, 0.1], [0.5, 0.6], [0.0, 0.2]])
    config = GroundingConfig(classes_per_entity=2, max_instances=3)
    assert instances(scores, np.array([1.0, 0.5]), config) == [
        ClassSegment(0, (0,), 0.9), ClassSegment(1, (0,), 0.5), ClassSegment(1, (1,), 0.3),
    ]  # fmt: skip


def test_category_lists_cover_every_name_once_per_order():
    config = GroundingConfig(class_names_per_prompt=4, order_averages=3)
    lists = category_lists(10, config)
    assert len(lists) == 3 and all(len(chunks) == 3 and max(map(len, chunks)) <= 4 for chunks in lists)
    assert all(sorted(np.concatenate(chunks)) == list(range(10)) for chunks in lists)
    assert np.concatenate(lists[0]).tolist() == list(range(10))
    assert np.concatenate(lists[1]).tolist() != list(range(10))


def test_names():
    names = ["floor-other-merged", "wall-brick", "0-cell_phone", "Tree-merged", "playingfield", "other-animal"]
    assert [clean_name(n) for n in names] == [
        "floor", "wall brick", "cell phone", "tree", "playingfield", "other animal",
    ]  # fmt: skip
    for names, message in (
        (["floor-other", "floor"], "category 'floor' and 'floor-other' are both 'floor'"),
        (["a", " "], "category name 2 is empty"),
        ([], "no category names"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            distinct_names(names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"refer_mode": "guess"}, "refer_mode is 'guess'; choose one of whole, extract"),
        ({"threshold": 1.5}, "threshold is 1.5; it must lie between 0 and 1"),
        ({"threshold": "high"}, "threshold is high; it must lie between 0 and 1"),
        ({"max_instances": 0}, "max_instances is 0; it must be a positive whole number"),
        ({"colorings": 1.5}, "colorings is 1.5; it must be a positive whole number"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GroundingConfig(**change)
    assert GroundingConfig(min_score=0).min_score == 0  # as the command line gives it
