"""Grounding metrics against the official evaluators' values, and by hand where nothing official exists."""

import json

import numpy as np
import pytest

from esg_jax.evaluation import EvaluationError
from esg_jax.evaluation.formats import coco, phrases
from esg_jax.evaluation.metrics.averages import ODINW13, average, few_shot
from esg_jax.evaluation.metrics.grounding.click import ClickIoU, click_point
from esg_jax.evaluation.metrics.grounding.phrase_grounding import PhraseGrounding
from esg_jax.evaluation.metrics.grounding.referring_comprehension import ReferringComprehension
from esg_jax.evaluation.metrics.grounding.referring_segmentation import ReferringSegmentation
from esg_jax.evaluation.metrics.grounding.text_recall import TextRecall, lemma
from esg_jax.masks import rle


def fixture(shared, name):
    folder = shared("fixtures", "metrics", name)
    return folder, json.loads((folder / "expected.json").read_text())


@pytest.mark.parametrize("soft", [False, True])
def test_phrase_grounding(shared, soft):
    folder, expected = fixture(shared, "png_ar")
    result = phrases.phrase_grounding(folder / "samples.json", folder / "samples.json", soft=soft).result()
    group = expected["via_256x256_bilinear_soft" if soft else "full_resolution"]
    for name, value in group.items():
        assert abs(result[name] - value) < 1e-7, name
    np.testing.assert_allclose(
        result["iou_per_phrase"], expected["ious_via_256" if soft else "ious_full_resolution"], atol=1e-6, rtol=0
    )
    if not soft:
        assert abs(result["acc@0.5"] - expected["acc_at_0_5"]) < 1e-9
        assert abs(result["mean_iou"] - expected["mean_iou"]) < 1e-6


def test_referring_segmentation(shared):
    folder, expected = fixture(shared, "res_iou")
    result = phrases.referring_segmentation(folder / "samples.json", folder / "samples.json").result()
    assert abs(result["cIoU"] - expected["ciou"]) < 1e-6
    assert abs(result["gIoU"] - expected["giou"]) < 1e-6
    np.testing.assert_allclose(result["iou_per_item"], expected["per_item_iou_fg"], atol=1e-6, rtol=0)
    assert result["total_intersection"] == expected["total_intersection"]
    assert result["total_union"] == expected["total_union"]
    assert result["num_items"] == expected["n_items"]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_referring_comprehension(shared, kind):
    folder, expected = fixture(shared, "rec_p50")
    result = coco.referring_comprehension(folder / "gt.json", folder / "predictions.json", kind=kind).result()
    for k, value in expected[kind]["P_at"].items():
        assert abs(result[f"P@{k}"] - value) < 1e-9
    assert abs(result["mIoU"] - expected[kind]["mIoU"]) < 1e-6
    assert abs(result["oIoU"] - expected[kind]["oIoU"]) < 1e-6
    np.testing.assert_allclose(result["iou_per_expression"], expected[kind]["iou_list"], atol=1e-6, rtol=0)


def test_click_iou(shared):
    folder, expected = fixture(shared, "click_miou")
    result = phrases.click_iou(folder / "samples.json", folder / "samples.json").result()
    assert abs(result["mIoU_1click"] - expected["mIoU_1click"]) < 1e-9
    np.testing.assert_allclose(result["iou_per_instance"], expected["iou_per_sample"], atol=1e-9, rtol=0)


def random_masks(rng, count=3):
    return rng.random((count, 12, 15)) < 0.5


def test_halves_merge_to_the_whole():
    rng = np.random.default_rng(0)
    for make, extra in ((PhraseGrounding, {"plural": True, "isthing": False}), (ReferringSegmentation, {})):
        whole, halves = make(), [make(), make()]
        for i in range(6):
            items = [{"pred": p, "gt": g, **extra} for p, g in zip(random_masks(rng), random_masks(rng), strict=True)]
            whole.add(i, items)
            halves[i % 2].add(i, items)
        np.testing.assert_equal(halves[0].merge(halves[1]).result(), whole.result())
    whole, halves = ClickIoU(), [ClickIoU(), ClickIoU()]
    comprehension = [ReferringComprehension("segm") for _ in range(3)]
    for i, (pred, target) in enumerate(zip(random_masks(rng, 5), random_masks(rng, 5), strict=True)):
        for metric in (whole, halves[i % 2]):
            metric.add(i, pred, target)
        for metric in (comprehension[0], comprehension[1 + i % 2]):
            metric.add(i, {"masks": pred[None], "scores": np.ones(1)}, {"masks": target[None]})
    assert halves[0].merge(halves[1]).result() == whole.result()
    assert comprehension[1].merge(comprehension[2]).result() == comprehension[0].result()
    whole, halves = TextRecall(), [TextRecall(), TextRecall()]
    for i, words in enumerate((["a dog", "cats"], ["sky"], ["two people"])):
        for metric in (whole, halves[i % 2]):
            metric.add(i, ["dog", "person"], words)
    assert halves[0].merge(halves[1]).result() == whole.result()


def test_sentences_that_mean_nothing_are_counted_apart():
    """Three sentences without target, one answered with a mask; two with a target, one not answered."""
    empty, full = np.zeros((4, 5), bool), np.ones((4, 5), bool)
    metric = ReferringSegmentation()
    metric.add(1, [{"pred": empty, "gt": empty}, {"pred": full, "gt": empty}, {"pred": full, "gt": full}])
    metric.add(2, [{"pred": empty, "gt": empty}, {"pred": empty, "gt": full}])
    result = metric.result()
    assert result["N-acc"] == pytest.approx(2 / 3) and result["T-acc"] == pytest.approx(1 / 2)
    assert result["gIoU"] == pytest.approx(3 / 5) and result["cIoU"] == pytest.approx(20 / 60)
    alone = ReferringSegmentation()
    alone.add(1, [{"pred": full, "gt": full}])
    assert np.isnan(alone.result()["N-acc"]) and alone.result()["T-acc"] == 1


def test_sizes_and_missing_records_are_refused(tmp_path):
    item = {"pred": np.ones((3, 4), bool), "gt": np.ones((4, 4), bool)}
    with pytest.raises(EvaluationError, match="image 8, item 0: prediction has size"):
        ReferringSegmentation().add(8, [item])
    with pytest.raises(EvaluationError, match="instance 2: the ground-truth mask is empty"):
        ClickIoU().add(2, np.ones((3, 3), bool), np.zeros((3, 3), bool))
    code = rle.encode(np.ones((1, 2, 2), bool))[0]
    code = rle.to_json(code)
    gt, pred = tmp_path / "gt.json", tmp_path / "pred.json"
    gt.write_text(json.dumps([{"image_id": 1, "items": [{"gt": code}]}]))
    pred.write_text(json.dumps([{"image_id": 2, "items": [{"pred": code}]}]))
    with pytest.raises(EvaluationError, match="image_id 1 is in only one"):
        phrases.referring_segmentation(gt, pred)
    pred.write_text(json.dumps([{"image_id": 1, "items": []}]))
    with pytest.raises(EvaluationError, match="image_id 1: 1 items"):
        phrases.referring_segmentation(gt, pred)


def test_text_recall_by_hand():
    metric = TextRecall()
    # "the brown dogs" has the head dog; "a red car" shares only a colour with the prediction; the sky is missed; one
    # "dog" cannot serve both annotated dogs.
    metric.add(0, ["dog", "red bicycles"], ["the brown dogs", "a red car", "the sky", "another dog"])
    assert metric.result() == {"AR_text_strict": 0.25, "AR_text_loose": 0.5, "num_phrases": 4}


@pytest.mark.parametrize(
    "plural, singular",
    [("dogs", "dog"), ("Benches", "bench"), ("ladies", "lady"), ("glass", "glass"), ("boxes", "box"), ("men", "man")],
)
def test_lemma(plural, singular):
    assert lemma(plural) == singular


def test_averages(tmp_path):
    assert average({"a": 0.5, "b": 0.25}) == 0.375
    with pytest.raises(EvaluationError, match="missing .*Raccoon"):
        average({name: 0.5 for name in ODINW13 if name != "Raccoon"}, ODINW13)
    with pytest.raises(EvaluationError, match="b has no score"):
        average({"a": 0.5, "b": float("nan")})
    table = few_shot([{"a": 0.2, "b": 0.4}, {"a": 0.4, "b": 0.4}, {"a": 0.6, "b": 0.7}])
    assert table["Avg"]["mean"] == pytest.approx(0.45)
    assert table["Avg"]["std"] == pytest.approx(np.std([0.3, 0.4, 0.65]))
    assert table["a"]["std_ddof1"] == pytest.approx(0.2)
    for seed, value in (("seed0", 0.1), ("seed1", 0.3)):
        (tmp_path / seed).mkdir()
        (tmp_path / seed / "x.json").write_text(json.dumps({"AP": value}))
    result = phrases.average_of_results(sorted(tmp_path.glob("*/x.json")), "AP")
    assert result["Avg_mean"] == pytest.approx(0.2) and result["x_std"] == pytest.approx(0.1)


def test_click_point_is_the_deepest_pixel():
    mask = np.zeros((20, 30), bool)
    mask[2:11, 5:14] = True
    mask[15:18, 20:23] = True
    assert click_point(mask) == (9, 6)
    with pytest.raises(EvaluationError, match="empty mask"):
        click_point(np.zeros((3, 3), bool))
