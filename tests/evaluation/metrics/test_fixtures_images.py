"""Expected values of the official evaluators, read from files in their official formats."""

import functools
import json
import math

import numpy as np
import pytest

from esg_jax.evaluation.formats import coco, files, label_maps
from esg_jax.evaluation.metrics.images import correction_effort
from esg_jax.evaluation.metrics.images.average_precision import AveragePrecision, EntityAP
from esg_jax.evaluation.metrics.images.consistency import AnnotatorConsistency
from esg_jax.evaluation.metrics.images.dichotomous import DichotomousMeasures
from esg_jax.evaluation.metrics.images.lvis import LvisAP


def fixture(shared, name):
    folder = shared("fixtures", "metrics", name)
    return folder, json.loads((folder / "expected.json").read_text())


def assert_close(got, expected, tolerance=1e-9, path=""):
    """Every expected number, null meaning NaN."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            assert_close(got[key], value, tolerance, f"{path}/{key}")
    elif isinstance(expected, list):
        assert len(got) == len(expected), path
        for i, (g, e) in enumerate(zip(got, expected, strict=True)):
            assert_close(g, e, tolerance, f"{path}/{i}")
    elif expected is None:
        assert math.isnan(got), path
    else:
        assert abs(got - expected) <= tolerance, f"{path}: {got} != {expected}"


def coco_names(result):
    """Our result with the fixtures' names."""
    out = dict(result)
    out["AR100_iou50"] = out["AR@100@IoU0.5"]
    out["AP_per_category"] = list(result["AP_per_category"].values())
    return out


@pytest.mark.parametrize("kind", ["segm", "bbox"])
def test_entity_ap(shared, kind):
    folder, expected = fixture(shared, "entity_ap")
    metric = coco.coco_ap(folder / "gt.json", folder / "predictions.json", kind=kind, class_agnostic=True)
    assert_close(coco_names(metric.result()), expected[kind])
    if kind == "segm":
        result = coco.entity_ap(folder / "gt.json", folder / "predictions.json").result()
        assert abs(result["AP"] - expected["AP_e"]) < 1e-9


def test_entity_ap_of_the_reference_model_file(shared):
    data = json.loads(shared("fixtures", "cropformer", "ap_e_dev.json").read_text())
    metric = EntityAP()
    for image in data["gt"]["images"]:
        uid = image["id"]
        metric.add(
            uid,
            [d for d in data["detections"] if d["image_id"] == uid],
            [a for a in data["gt"]["annotations"] if a["image_id"] == uid],
            (image["height"], image["width"]),
        )
    result = metric.result()
    assert_close(result, data["expected"], 1e-12)
    assert result["AR@100@IoU0.5"] == pytest.approx(data["expected_AR100_iou50"], abs=1e-12)


@pytest.mark.parametrize("key", ["segm", "bbox", "segm_if_bbox_not_dropped"])
def test_coco_ap(shared, key):
    folder, expected = fixture(shared, "coco_ap")
    metric = coco.coco_ap(
        folder / "gt.json", folder / "predictions.json", kind=key[:4], box_areas=key.endswith("dropped")
    )
    assert_close(coco_names(metric.result()), expected[key])


@pytest.mark.parametrize(
    "key, kind, agnostic",
    [
        ("boundary_ap_class_aware", "boundary", False),
        ("boundary_ap_class_agnostic", "boundary", True),
        ("mask_ap_class_aware", "segm", False),
    ],
)
def test_boundary_ap(shared, key, kind, agnostic):
    folder, expected = fixture(shared, "boundary_ap")
    metric = coco.coco_ap(
        folder / "gt.json", folder / "predictions.json", kind=kind, class_agnostic=agnostic, workers=1
    )
    assert_close(coco_names(metric.result()), expected[key])


def test_boundary_pixels(shared):
    from esg_jax.evaluation.metrics.boundary import boundary_area
    from esg_jax.masks import rle

    folder, expected = fixture(shared, "boundary_ap")
    gt = coco.CocoAnnotations.load(folder / "gt.json")
    first = gt.raw["annotations"][0]
    mask = rle.from_annotation(first["segmentation"], gt.size(first["image_id"]), "first")
    assert boundary_area(mask) == expected["boundary_pixels_first_gt"]


def test_panoptic_quality(shared):
    folder, expected = fixture(shared, "panoptic_pq")
    result = label_maps.panoptic_quality(folder / "gt.json", folder / "pred.json").result()
    for suffix, group in (("", "All"), ("_Th", "Things"), ("_St", "Stuff")):
        for key in ("PQ", "SQ", "RQ"):
            assert abs(result[key + suffix] - expected[group][key.lower()]) < 1e-9
        assert result["n" + suffix] == expected[group]["n"]
    for category, values in expected["per_class"].items():
        assert_close({k.lower(): v for k, v in result["per_class"][int(category)].items()}, values)


def test_semantic_iou(shared):
    folder, expected = fixture(shared, "miou")
    meta = json.loads((folder / "meta.json").read_text())
    result = label_maps.semantic_iou(
        folder / "gt",
        folder / "pred",
        num_classes=meta["num_classes"],
        ignore_label=meta["ignore_label"],
        boundary=True,
    ).result()
    got = {name: 100 * result[name] for name in ("mIoU", "fwIoU", "mACC", "pACC")}
    got["mIoU_detectron2_v0.6_era_as_vendored_by_GLEE"] = 100 * result["mIoU_with_predicted_only"]
    for ours, theirs in (
        ("IoU_per_class", "IoU"),
        ("ACC_per_class", "ACC"),
        ("boundary_IoU_per_class", "BoundaryIoU"),
        ("min_IoU_per_class", "min(IoU, B-Iou)"),
    ):
        got |= {f"{theirs}-{i}": 100 * value for i, value in enumerate(result[ours])}
    del expected["evaluator"]
    assert_close(got, expected)


def test_numpy_masks_equal_files(shared):
    """The streaming interface with boolean masks gives the numbers of the files."""
    from pycocotools import mask as coco_mask

    folder, expected = fixture(shared, "entity_ap")
    gt = coco.CocoAnnotations.load(folder / "gt.json")
    pred = coco.load_results(folder / "predictions.json", gt.units)
    metric = AveragePrecision(class_agnostic=True)
    for uid in gt.units:
        size = gt.size(uid)
        masks = [coco_mask.decode(r["segmentation"]).astype(bool) for r in pred[uid]]
        metric.add(
            uid,
            {
                "masks": np.stack(masks) if masks else np.zeros((0, *size), bool),
                "scores": np.array([r["score"] for r in pred[uid]]),
            },
            gt.annotations[uid],
            size,
        )
    assert_close(coco_names(metric.result()), expected["segm"])


@pytest.mark.parametrize("kind", ["segm", "bbox"])
@pytest.mark.parametrize("variant", ["AP", "maxdets20", "fixed"])
def test_lvis_ap(shared, kind, variant):
    folder, expected = fixture(shared, "lvis_ap")
    options = {"AP": {}, "maxdets20": {"max_dets": 20}, "fixed": {"top_per_class": 40}}[variant]
    metric = coco.lvis_ap(folder / "gt.json", folder / f"predictions_{kind}.json", kind=kind, **options)
    assert_close(metric.result(), expected[f"{kind}_{variant}"])


def test_dichotomous_measures(shared):
    pytest.importorskip("cv2")
    pytest.importorskip("skimage")
    folder, expected = fixture(shared, "dis")
    result = label_maps.dichotomous(folder / "gt", folder / "pred").result()
    names = ("maxF", "meanF", "adpF", "wF", "S", "E_mean", "E_max", "E_adp", "MAE", "F_curve", "E_curve", "HCE")
    assert_close(result, {name: expected[name] for name in names})
    per_image = expected["per_image"]
    assert_close(result, {f"{name}_per_image": per_image[name] for name in ("wF", "S", "MAE")})
    parts = [row[:4] for row in per_image["HCE_FPpts_FPind_FNpts_FNind_total"]]
    assert_close(result["HCE_parts_per_image"], parts)
    # pysodmetrics stretches the prediction before its threshold: another number for the same masks.
    stretched = []
    for _, gt, pred in files.paired_files(folder / "gt", folder / "pred"):
        grey = files.read_image(pred, "L").astype(float)
        grey = (grey - grey.min()) / max(grey.max() - grey.min(), 1e-9)
        stretched.append(sum(correction_effort.correction_effort(grey > 0.5, files.read_image(gt, "L") > 128)))
    assert np.mean(stretched) == expected["HCE_pysodmetrics"]["hce"]


def split_and_merge(whole, blank):
    """The records of `whole` in two halves, merged: must give the same numbers."""
    halves = [blank(), blank()]
    for i, (key, record) in enumerate(reversed(whole._records.items())):
        halves[i % 2]._store(key, record)
    np.testing.assert_equal(halves[0].merge(halves[1]).result(), whole.result())


def test_lvis_and_dis_halves_merge_to_the_whole(shared):
    folder = shared("fixtures", "metrics", "lvis_ap")
    for options in ({}, {"top_per_class": 40}):
        whole = coco.lvis_ap(folder / "gt.json", folder / "predictions_segm.json", **options)
        categories = [{"id": c, "frequency": f} for c, f in whole.frequency.items()]
        make = functools.partial(
            LvisAP, categories, max_dets=whole.max_dets, top_per_class=options.get("top_per_class")
        )
        split_and_merge(whole, make)
    folder = shared("fixtures", "metrics", "dis")
    whole = label_maps.dichotomous(folder / "gt", folder / "pred", correction_effort=False)
    split_and_merge(whole, lambda: DichotomousMeasures(correction_effort=False))


def test_consistency_of_annotators(shared):
    """One file against itself: every mask and class agrees; tied scores count in file order."""
    folder = shared("fixtures", "metrics", "coco_ap")
    result = coco.consistency(folder / "gt.json", folder / "gt.json").result()
    annotations = json.loads((folder / "gt.json").read_text())["annotations"]
    assert result["ACC"] == 1.0 and result["num_same_masks"] >= len(annotations)
    # Against predictions with the scores removed, AP^e with all scores equal.
    gt = coco.CocoAnnotations.load(folder / "gt.json")
    pred = coco.load_results(folder / "predictions.json", gt.units)
    equal, consistency = EntityAP(), AnnotatorConsistency()
    for uid in gt.units:
        plain = [{k: r[k] for k in ("segmentation", "category_id")} for r in pred[uid]]
        equal.add(uid, [r | {"score": 1.0} for r in plain], gt.annotations[uid], gt.size(uid))
        consistency.add(uid, plain, gt.annotations[uid], gt.size(uid))
    assert consistency.result()["mAP"] == equal.result()["AP"] > 0.05
