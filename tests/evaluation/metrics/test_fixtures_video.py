"""Video metrics against the official evaluators' values."""

import json

import numpy as np
import pytest

from esg_jax.evaluation import EvaluationError
from esg_jax.evaluation.formats import video
from esg_jax.evaluation.metrics.video.hota import BurstHOTA
from esg_jax.evaluation.metrics.video.teta import TaoTETA
from esg_jax.evaluation.metrics.video.video_instance import VideoInstanceAP
from esg_jax.evaluation.metrics.video.video_object import VideoObjectSegmentation, contour_accuracy

BURST_CLASSES = {1: "acorn", 2: "aerosol_can", 3: "air_conditioner", 4: "airplane", 5: "alarm_clock"}


def fixture(shared, name):
    folder = shared("fixtures", "metrics", name)
    return folder, json.loads((folder / "expected.json").read_text())


def assert_all_close(got, expected, tolerance=1e-9):
    """Every number of `expected`, nested dictionaries and lists."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            assert_all_close(got[key], value, tolerance)
    else:
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)


def test_davis(shared):
    folder, expected = fixture(shared, "jf")
    result = video.video_object_segmentation(
        folder / "gt", folder / "pred", sequences=folder / "sequences.json"
    ).result()
    names = {"JF_mean": "JF", "J_mean": "J", "F_mean": "F"}
    for name, value in expected["davis2017_semi"].items():
        assert_all_close(result[names.get(name, name)], value)


def test_youtube_vos(shared):
    folder, expected = fixture(shared, "jf")
    result = video.video_object_segmentation(
        folder / "gt", folder / "pred", protocol="youtube_vos", meta=folder / "ytvos_meta.json"
    ).result()
    assert_all_close(result, expected["ytvos_style_assumed_protocol"])
    assert_all_close(result, expected["mean_over_objects_frames_1_to_last"])
    for name, values in expected["per_frame_J_F_frames_1_to_last"].items():
        assert_all_close(result["J_per_frame"][name], values["J"])
        assert_all_close(result["F_per_frame"][name], values["F"])


def test_video_instance_ap(shared):
    folder, expected = fixture(shared, "ytvis_ap")
    result = video.video_instance_ap(folder / "gt.json", folder / "results.json").result()
    result["AP_per_category"] = list(result["AP_per_category"].values())
    assert_all_close(result, {k: v for k, v in expected.items() if k not in ("areaRng", "maxDets", "evaluator")})


def test_burst_hota(shared):
    folder, expected = fixture(shared, "burst_hota")
    result = video.burst_hota(
        folder / "gt" / "all_classes.json", folder / "trackers" / "esg" / "data" / "results.json"
    ).result()
    combined = expected["combined"]
    assert_all_close(result, combined["cls_comb_cls_av"])
    assert_all_close(result["detection_averaged"], combined["cls_comb_det_av"])
    for label, name in BURST_CLASSES.items():
        assert_all_close(result["per_class"][label], combined[name])


def test_burst_hota_of_masks_differs(shared):
    """The switch for what the benchmark means to measure."""
    folder, _ = fixture(shared, "burst_hota")
    files = folder / "gt" / "all_classes.json", folder / "trackers" / "esg" / "data" / "results.json"
    box, mask = (video.burst_hota(*files, overlap=name).result()["HOTA"] for name in ("box", "mask"))
    assert mask < box - 0.02


def test_tao_teta(shared):
    folder, expected = fixture(shared, "tao_teta")
    result = video.tao_teta(folder / "gt.json", folder / "results.json").result()
    assert_all_close(result, expected["headline"])
    assert_all_close(result["per_alpha"], expected["average_combined_seq_alpha50"])
    names = {c["name"]: c["id"] for c in json.loads((folder / "gt.json").read_text())["categories"]}
    assert set(expected["per_class_alpha50"]) == {n for n, i in names.items() if i in result["per_class"]}
    for name, values in expected["per_class_alpha50"].items():
        assert_all_close(result["per_class"][names[name]], values)


@pytest.mark.parametrize("name", ["jf", "ytvis_ap", "burst_hota", "tao_teta"])
def test_halves_merge_to_the_whole(shared, name):
    folder, _ = fixture(shared, name)
    whole = {
        "jf": lambda: video.video_object_segmentation(folder / "gt", folder / "pred"),
        "ytvis_ap": lambda: video.video_instance_ap(folder / "gt.json", folder / "results.json"),
        "burst_hota": lambda: video.burst_hota(
            folder / "gt" / "all_classes.json", folder / "trackers" / "esg" / "data" / "results.json"
        ),
        "tao_teta": lambda: video.tao_teta(folder / "gt.json", folder / "results.json"),
    }[name]()
    blank = {
        "jf": VideoObjectSegmentation,
        "ytvis_ap": lambda: VideoInstanceAP(whole.categories),
        "burst_hota": BurstHOTA,
        "tao_teta": TaoTETA,
    }[name]
    halves = [blank(), blank()]
    for i, (key, record) in enumerate(reversed(whole._records.items())):
        halves[i % 2]._store(key, record)
    np.testing.assert_equal(halves[0].merge(halves[1]).result(), whole.result())


def test_contour_accuracy_tolerates_small_shifts():
    target = np.zeros((100, 200), bool)
    target[30:60, 50:120] = True
    near, far = np.roll(target, 2, axis=1), np.roll(target, 5, axis=1)
    assert contour_accuracy(near, target) == 1.0  # ceil(0.008 * 223.6) = 2 pixels
    assert 0.3 < contour_accuracy(far, target) < 0.9
    assert contour_accuracy(np.zeros_like(target), target) == 0.0
    assert contour_accuracy(np.zeros_like(target), np.zeros_like(target)) == 1.0


def test_bad_video_input_is_refused(tmp_path):
    zeros = np.zeros((4, 5), np.uint8)
    one = zeros.copy()
    one[1:3, 1:3] = 1
    two = one * 2
    with pytest.raises(EvaluationError, match="clip, frame 1: predicted object 2 is not annotated"):
        VideoObjectSegmentation().add("clip", [(one, one), (two, one), (one, one)])
    with pytest.raises(EvaluationError, match="clip, frame 0: prediction"):
        VideoObjectSegmentation().add("clip", [(one[:3], one)])
    metric = VideoInstanceAP([1])
    record = {"category_id": 1, "score": 0.5, "segmentations": [None, None]}
    with pytest.raises(EvaluationError, match="video 3, prediction 0: 'segmentations' needs one entry per frame .3."):
        metric.add(3, [record], [], (4, 5), 3)
    with pytest.raises(EvaluationError, match="video 3, prediction 0: score is nan"):
        metric.add(3, [record | {"score": float("nan")}], [], (4, 5), 2)
    sequence = {
        "dataset": "d",
        "seq_name": "s",
        "height": 4,
        "width": 5,
        "annotated_image_paths": [],
        "segmentations": [],
        "neg_category_ids": [],
        "not_exhaustive_category_ids": [],
    }
    (tmp_path / "gt.json").write_text(json.dumps({"sequences": [sequence]}))
    (tmp_path / "pred.json").write_text(json.dumps({"sequences": [sequence | {"seq_name": "other"}]}))
    with pytest.raises(EvaluationError, match="sequence d/other .* is not in"):
        video.burst_hota(tmp_path / "gt.json", tmp_path / "pred.json")
