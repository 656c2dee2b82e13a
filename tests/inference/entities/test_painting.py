"""Fusion and painting: golden outputs of the reference, and tiles against the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esg_jax.inference.entities.canvas import make_canvas
from esg_jax.inference.entities.fusion import fused_probability, view_probability
from esg_jax.inference.entities.painting import paint
from esg_jax.inference.entities.scores import ScoreMode
from esg_jax.input.transforms import inference_view_list, round_up


@pytest.fixture(scope="module")
def golden(shared):
    return np.load(shared("fixtures", "cropformer", "infer_dev.npz"))


@pytest.fixture(scope="module")
def geometry(golden):
    """Padded size, view sizes, boxes, original size."""
    original = tuple(int(side) for side in golden["input/height_width"])
    boxes = np.concatenate([[[0, 0, original[1], original[0]]], golden["input/crop_region"]]).astype(np.int32)
    return (64, 96), golden["mid/inference/image_sizes"].astype(np.int32), boxes, original


def class_score(logits):
    return jax.nn.softmax(logits)[..., 0]


def test_views_are_those_of_the_reference(geometry):
    padded, sizes, boxes, original = geometry
    views = inference_view_list(*original, short_edge=64, max_size=100)
    np.testing.assert_array_equal([view.size for view in views], sizes)
    np.testing.assert_array_equal([view.box for view in views], boxes)
    assert round_up(tuple(sizes.max(0))) == padded


def test_probabilities_match_reference(golden, geometry):
    padded, sizes, boxes, original = geometry
    logits = jnp.asarray(golden["out/batch/pred_masks"][0])
    np.testing.assert_allclose(
        class_score(golden["out/batch/pred_logits"][0]), golden["mid/inference/class_score_by_query"], atol=1e-6
    )
    expected = golden["mid/inference/view3_prob_by_query"]
    actual = view_probability(logits[:, 3], padded, tuple(sizes[3]), expected.shape[1:])
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    np.testing.assert_allclose(
        fused_probability(logits, padded, sizes, boxes, original),
        golden["mid/inference/fused_prob_by_query"],
        atol=1e-5,
    )


def test_entities_match_reference(golden, geometry):
    padded, sizes, boxes, original = geometry
    canvas = make_canvas((16, 24), padded, sizes[None], boxes[None], [original])
    painted = paint(class_score(golden["out/batch/pred_logits"]), golden["out/batch/pred_masks"], canvas)
    entities = painted.to_predictions([original])[0]
    np.testing.assert_array_equal(entities.queries, golden["out/inference/query_order"])
    np.testing.assert_array_equal(entities.labels, golden["out/inference/pred_classes"])
    np.testing.assert_allclose(entities.scores, golden["out/inference/scores"], atol=1e-5)
    near = np.any(np.abs(golden["mid/inference/fused_prob_by_query"] - 0.5) < 1e-6, axis=0)
    differs = np.any(entities.masks != golden["out/inference/pred_masks"].astype(bool), axis=0)
    assert not np.any(differs & ~near)


def test_single_view_entities_match_reference(golden, geometry):
    padded, sizes, boxes, original = geometry
    canvas = make_canvas((16, 24), padded, sizes[None, :1], boxes[None, :1], [original])
    logits = golden["out/mask2former/pred_masks"][:, :, None]
    entities = paint(class_score(golden["out/mask2former/pred_logits"]), logits, canvas).to_predictions([original])[0]
    np.testing.assert_allclose(entities.scores, golden["out/mask2former/inference_scores"], atol=1e-5)
    np.testing.assert_array_equal(entities.masks, golden["out/mask2former/inference_masks"].astype(bool))


def random_scene(rng, original, queries, views, min_size=96, max_size=160):
    """Noisy blobs seen by every view: class scores, logits, geometry."""
    height, width = original
    geometry = inference_view_list(height, width, num_views=views, short_edge=min_size, max_size=max_size)
    sizes = np.array([view.size for view in geometry], np.int32)
    boxes = np.array([view.box for view in geometry], np.int32)
    padded = round_up(tuple(sizes.max(0)))
    cells = padded[0] // 4, padded[1] // 4
    centre = rng.uniform(0, 1, (queries, 2)) * original
    logits = np.empty((queries, views, *cells), np.float32)
    for index, (x0, y0, x1, y1) in enumerate(boxes):
        y = y0 + (np.arange(cells[0]) + 0.5) * 4 * (y1 - y0) / sizes[index, 0]
        x = x0 + (np.arange(cells[1]) + 0.5) * 4 * (x1 - x0) / sizes[index, 1]
        distance = np.hypot((y - centre[:, :1])[:, :, None], (x - centre[:, 1:])[:, None, :])
        logits[:, index] = 4 - 20 * distance / np.sqrt(height * width) + rng.normal(0, 1, distance.shape)
    return rng.uniform(0, 1, queries).astype(np.float32), logits, padded, sizes, boxes


def painted_by_definition(score, probability):
    """Label map by painting full-size masks in ascending score order (ties: higher query first)."""
    label_map = np.zeros(probability.shape[1:], int)
    order = np.lexsort((np.arange(len(score)), -score))
    for rank in reversed(range(len(order))):
        label_map[probability[order[rank]] > 0.5] = rank + 1
    return label_map, order


@pytest.mark.parametrize("original", [(300, 410), (97, 530), (40, 33)])
@pytest.mark.parametrize("views", [5, 1])
@pytest.mark.parametrize("chunk", [1, 4])
def test_tiles_equal_the_definition(original, views, chunk):
    score, logits, padded, sizes, boxes = random_scene(np.random.default_rng(0), original, 12, views)
    probability = np.asarray(fused_probability(jnp.asarray(logits), padded, sizes, boxes, original))
    expected, order = painted_by_definition(score, probability)
    canvas = make_canvas(logits.shape[-2:], padded, sizes[None], boxes[None], [original])
    entities = paint(score[None], logits[None], canvas, chunk=chunk).to_predictions([original])[0]
    near = np.any(np.abs(probability - 0.5) < 1e-6, axis=0)
    np.testing.assert_array_equal(entities.label_map[~near], expected[~near])
    np.testing.assert_array_equal(entities.queries, order)
    assert 0.3 < np.mean(expected > 0) < 1 and len(np.unique(expected)) > 4  # the scene is worth a test


def test_score_modes():
    original = (130, 200)
    score, logits, padded, sizes, boxes = random_scene(np.random.default_rng(1), original, 6, 5)
    score[3] = 0.0  # painted over, or empty
    logits[3] = -9
    probability = np.asarray(fused_probability(jnp.asarray(logits), padded, sizes, boxes, original))
    label_map, order = painted_by_definition(score, probability)
    canvas = make_canvas(logits.shape[-2:], padded, sizes[None], boxes[None], [original])
    squash = {ScoreMode.REFERENCE: lambda p: 1 / (1 + np.exp(-p)), ScoreMode.QUALITY: lambda p: p}
    for mode in ScoreMode:
        scores = np.asarray(paint(score[None], logits[None], canvas, score_mode=mode).scores[0])
        for rank, query in enumerate(order):
            inside = probability[query][label_map == rank + 1]
            if mode == ScoreMode.ENTITYNESS:
                expected = score[query] if inside.size else 0
            else:
                expected = score[query] * squash[mode](inside).sum() / (inside.size + 1e-6)
            np.testing.assert_allclose(scores[rank], expected, atol=1e-5)


def test_equal_scores_keep_the_order_of_queries():
    original = (64, 64)
    _, logits, padded, sizes, boxes = random_scene(np.random.default_rng(2), original, 5, 1)
    logits[:] = 1.0  # everybody claims everything
    canvas = make_canvas(logits.shape[-2:], padded, sizes[None], boxes[None], [original])
    entities = paint(np.full((1, 5), 0.5, np.float32), logits[None], canvas).to_predictions([original])[0]
    np.testing.assert_array_equal(entities.queries, np.arange(5))
    assert entities.areas.tolist() == [64 * 64, 0, 0, 0, 0]


def test_batch_equals_single_images_in_one_program():
    rng = np.random.default_rng(3)
    originals = [(300, 410), (280, 400)]
    scenes = [random_scene(rng, original, 8, 5) for original in originals]
    score, logits = (np.stack([scene[field] for scene in scenes]) for field in (0, 1))
    padded = scenes[0][2]
    assert padded == scenes[1][2]
    sizes, boxes = (np.stack([scene[field] for scene in scenes]) for field in (3, 4))
    canvas = make_canvas(logits.shape[-2:], padded, sizes, boxes, originals)
    batch = paint(score, logits, canvas).to_predictions(originals)
    paint.clear_cache()
    for index, original in enumerate(originals):
        one = slice(index, index + 1)
        canvas = make_canvas(logits.shape[-2:], padded, sizes[one], boxes[one], [original])
        single = paint(score[one], logits[one], canvas).to_predictions([original])[0]
        np.testing.assert_array_equal(single.label_map, batch[index].label_map)
        np.testing.assert_array_equal(single.scores, batch[index].scores)
    assert paint._cache_size() == 1  # two image sizes, one program


def test_refuses_views_outside_the_image():
    with pytest.raises(ValueError, match="do not fit"):
        make_canvas((8, 8), (32, 32), np.array([[[40, 32]]]), np.array([[[0, 0, 50, 50]]]), [(50, 50)])
