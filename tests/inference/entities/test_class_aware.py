"""Instance, panoptic and semantic inference against full-size formulas in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esg_jax.inference.entities import class_aware
from esg_jax.inference.entities.canvas import make_canvas
from esg_jax.input.transforms import inference_view_list, round_up
from esg_jax.ops.resize import resize_bilinear

CLASSES = 3


class Scene:
    """Two images of different sizes with equal padding, and the full-size logits of every query."""

    originals = [(150, 290), (160, 300)]

    def __init__(self):
        rng = np.random.default_rng(0)
        views = [inference_view_list(*size, num_views=1, short_edge=64, max_size=128) for size in self.originals]
        sizes = np.array([[view.size for view in image] for image in views], np.int32)
        boxes = np.array([[view.box for view in image] for image in views], np.int32)
        self.padded = round_up(tuple(sizes.max((0, 1))))
        cells = self.padded[0] // 4, self.padded[1] // 4
        self.class_logits = rng.normal(0, 3, (2, 8, CLASSES + 1)).astype(np.float32)
        noise = jnp.asarray(rng.normal(0, 6, (2, 8, 4, 5)), jnp.float32)
        self.mask_logits = np.asarray(resize_bilinear(noise, cells, axes=(-2, -1)))
        self.canvas = make_canvas(cells, self.padded, sizes, boxes, self.originals)
        self.pixel_canvas = make_canvas(self.padded, self.padded, sizes, boxes, self.originals)
        self.sizes = sizes

    def full(self, image, values_chw):
        """Values at padded resolution, cut and resized to the original."""
        height, width = self.sizes[image, 0]
        cut = jnp.asarray(values_chw)[:, :height, :width]
        return np.asarray(resize_bilinear(cut, self.originals[image], axes=(-2, -1)))

    def padded_logits(self, image):
        return resize_bilinear(jnp.asarray(self.mask_logits[image]), self.padded, axes=(-2, -1))

    def probability(self, image):
        return np.asarray(jax.nn.softmax(self.class_logits[image]))


@pytest.fixture(scope="module")
def scene():
    return Scene()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_instances(scene):
    outputs = class_aware.instance_masks(scene.class_logits, scene.mask_logits, scene.canvas, limit=10)
    predictions = class_aware.to_instances(outputs, scene.originals)
    for image, prediction in enumerate(predictions):
        logits = scene.full(image, scene.padded_logits(image))
        probability = scene.probability(image)[:, :-1].ravel()
        top = np.argsort(-probability, kind="stable")[:10]
        masks = logits[top // CLASSES] > 0
        scores = probability[top] * (sigmoid(logits[top // CLASSES]) * masks).sum((1, 2)) / (masks.sum((1, 2)) + 1e-6)
        order = np.argsort(-scores, kind="stable")
        np.testing.assert_allclose(prediction.scores, scores[order], atol=1e-5)
        np.testing.assert_array_equal(prediction.labels, (top % CLASSES)[order])
        np.testing.assert_array_equal(prediction.queries, (top // CLASSES)[order])
        near = np.abs(logits[top // CLASSES][order]) < 1e-5
        assert not np.any((prediction.masks != masks[order]) & ~near)
        assert (masks.sum(0) > 1).any()  # they overlap


def panoptic_by_definition(probability, logits, is_thing, score_threshold, overlap):
    score, label = probability.max(-1), probability.argmax(-1)
    keep = np.flatnonzero((label != CLASSES) & (score > score_threshold))
    masks = sigmoid(logits[keep])
    owner = (score[keep, None, None] * masks).argmax(0)
    segment_map, segments, stuff = np.zeros(logits.shape[1:], int), [], {}
    for row, query in enumerate(keep):
        visible = (owner == row) & (masks[row] >= 0.5)
        original = (masks[row] >= 0.5).sum()
        if not visible.any() or (owner == row).sum() / original < overlap:
            continue
        category = label[query]
        if not is_thing[category] and category in stuff:
            segment_map[visible] = stuff[category]
            continue
        segments.append((len(segments) + 1, category))
        segment_map[visible] = len(segments)
        if not is_thing[category]:
            stuff[category] = len(segments)
    return segment_map, segments


@pytest.mark.parametrize("is_thing", [(True, True, True), (False, True, False)])
def test_panoptic(scene, is_thing):
    outputs = class_aware.panoptic_masks(scene.class_logits, scene.mask_logits, scene.canvas, score_threshold=0.4)
    predictions = class_aware.to_panoptic(outputs, scene.originals, np.array(is_thing), overlap_threshold=0.3)
    for image, prediction in enumerate(predictions):
        logits = scene.full(image, scene.padded_logits(image))
        expected, segments = panoptic_by_definition(scene.probability(image), logits, is_thing, 0.4, 0.3)
        assert len(segments) > 1
        assert [(segment.id, segment.category) for segment in prediction.segments] == segments
        assert np.mean(prediction.segment_map != expected) < 1e-4  # pixels within rounding of a tie


def test_panoptic_without_any_confident_query(scene):
    outputs = class_aware.panoptic_masks(scene.class_logits, scene.mask_logits, scene.canvas, score_threshold=1.0)
    for prediction in class_aware.to_panoptic(outputs, scene.originals, np.ones(CLASSES, bool)):
        assert prediction.segments == [] and not prediction.segment_map.any()


def test_semantic(scene):
    scores = class_aware.semantic_scores(scene.class_logits, scene.mask_logits, padded=scene.padded)
    labels = np.asarray(class_aware.semantic_labels(scores, scene.pixel_canvas))
    for image, (height, width) in enumerate(scene.originals):
        mask = sigmoid(np.asarray(scene.padded_logits(image)))
        combined = np.einsum("qc,qhw->chw", scene.probability(image)[:, :-1], mask)
        expected = scene.full(image, combined).argmax(0)
        assert np.mean(labels[image, :height, :width] != expected) < 1e-4
        assert len(np.unique(expected)) > 1
