"""Merging, input checks and the command line, on small synthetic sets that need no golden data."""

import copy
import json
import math
import warnings

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from esg_jax import cli
from esg_jax.evaluation import (
    AveragePrecision,
    BestOverlap,
    EntityAP,
    EvaluationError,
    PanopticQuality,
    SemanticIoU,
)
from esg_jax.evaluation.formats import coco, label_maps
from esg_jax.evaluation.metrics.boundary import erode
from esg_jax.evaluation.workers import accumulate
from esg_jax.masks import MaskError, rle


def scene(seed, num_targets=5, num_preds=12, size=(40, 50), classes=3):
    """COCO records of one image: rectangles, predictions near the targets, tied scores."""
    rng = np.random.default_rng(seed)

    def record(box, **extra):
        mask = np.zeros(size, bool)
        mask[box[1] : box[1] + box[3], box[0] : box[0] + box[2]] = True
        code = rle.encode(mask[None])[0]
        code = rle.to_json(code)
        return {"image_id": seed, "segmentation": code, "bbox": [float(v) for v in box], **extra}

    def box():
        x, y = rng.integers(0, size[1] - 8), rng.integers(0, size[0] - 8)
        return [int(x), int(y), int(rng.integers(4, size[1] - x)), int(rng.integers(4, size[0] - y))]

    boxes = [box() for _ in range(num_targets)]
    targets = [
        record(
            b,
            id=100 * seed + i + 1,
            category_id=int(rng.integers(1, classes + 1)),
            iscrowd=int(i == 0),
            area=b[2] * b[3],
        )
        for i, b in enumerate(boxes)
    ]
    preds = []
    for i in range(num_preds):
        b = boxes[i % num_targets] if i < 2 * num_targets else box()
        b = [b[0], b[1], max(3, b[2] - int(rng.integers(0, 4))), max(3, b[3] - int(rng.integers(0, 4)))]
        preds.append(record(b, category_id=int(rng.integers(1, classes + 1)), score=float(np.round(rng.random(), 1))))
    return preds, targets


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    scenes = {i: scene(i) for i in range(1, 9)}
    gt = {
        "images": [{"id": i, "height": 40, "width": 50} for i in scenes],
        "annotations": [t for _, targets in scenes.values() for t in targets],
        "categories": [{"id": c, "name": str(c)} for c in (1, 2, 3)],
    }
    preds = [p for ps, _ in scenes.values() for p in ps]
    (folder / "gt.json").write_text(json.dumps(gt))
    (folder / "pred.json").write_text(json.dumps(preds))
    return folder, gt, preds, scenes


@pytest.mark.parametrize("kind", ["segm", "bbox"])
def test_equal_to_pycocotools(dataset, kind, capsys):
    folder, _, preds, _ = dataset
    official = COCO(str(folder / "gt.json"))
    keep = "bbox" if kind == "bbox" else "segmentation"
    stripped = [{k: v for k, v in p.items() if k in ("image_id", "category_id", "score", keep)} for p in preds]
    evaluator = COCOeval(official, official.loadRes(stripped), kind)
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    result = coco.coco_ap(folder / "gt.json", folder / "pred.json", kind=kind).result()
    names = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
    np.testing.assert_allclose([result[n] for n in names], evaluator.stats, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "make",
    [EntityAP, AveragePrecision, BestOverlap, lambda: AveragePrecision("boundary")],
    ids=["entity", "class_aware", "best_overlap", "boundary"],
)
def test_halves_merge_to_the_whole(dataset, make):
    *_, scenes = dataset
    whole, halves = make(), [make(), make()]
    for i, (preds, targets) in scenes.items():
        whole.add(i, preds, targets)
    for i, (preds, targets) in reversed(scenes.items()):  # neither order nor split may matter
        halves[i % 2].add(i, preds, targets)
    assert halves[0].merge(halves[1]).result() == whole.result()


def test_workers_give_the_same_numbers(dataset):
    folder, *_ = dataset
    one = coco.entity_ap(folder / "gt.json", folder / "pred.json").result()
    assert coco.entity_ap(folder / "gt.json", folder / "pred.json", workers=2).result() == one


def panoptic_image(seed):
    rng = np.random.default_rng(seed)
    target = np.kron(rng.integers(0, 5, (4, 5)), np.ones((8, 8), int))
    pred = np.where(rng.random(target.shape) < 0.15, rng.integers(0, 6, target.shape), target)

    def records(ids):
        return [{"id": int(i), "category_id": 1 + int(i) % 3} for i in np.unique(ids) if i]

    return (pred, records(pred)), (target, records(target))


def test_panoptic_halves_merge_to_the_whole():
    categories = [{"id": c, "isthing": c % 2} for c in (1, 2, 3)]
    whole, halves = PanopticQuality(categories), [PanopticQuality(categories), PanopticQuality(categories)]
    for i in range(6):
        whole.add(i, *panoptic_image(i))
        halves[i % 2].add(i, *panoptic_image(i))
    assert whole.result()["PQ"] > 0.1
    assert halves[0].merge(halves[1]).result() == whole.result()


def test_semantic_halves_merge_to_the_whole():
    rng = np.random.default_rng(0)
    whole, halves = SemanticIoU(4, boundary=True), [SemanticIoU(4, boundary=True), SemanticIoU(4, boundary=True)]
    for i in range(6):
        pred, target = rng.integers(0, 4, (20, 30)), rng.integers(0, 4, (20, 30))
        target[:3] = 255
        whole.add(i, pred, target)
        halves[i % 2].add(i, pred, target)
    assert halves[0].merge(halves[1]).result() == whole.result()


def test_merge_refuses_overlap_and_other_settings(dataset):
    *_, scenes = dataset
    a, b = EntityAP(), EntityAP()
    a.add(1, *scenes[1])
    b.add(1, *scenes[1])
    with pytest.raises(EvaluationError, match="image 1 was added twice"):
        a.merge(b)
    with pytest.raises(EvaluationError, match="same settings"):
        a.merge(EntityAP(max_dets=(1, 10, 300)))


def test_best_overlap_by_hand():
    masks = np.zeros((2, 4, 4), bool)
    masks[0, :2], masks[1, 2:] = True, True
    pred = np.zeros((1, 4, 4), bool)
    pred[0, :2, :3] = True
    metric = BestOverlap()
    metric.add(0, {"masks": pred, "scores": np.ones(1)}, {"masks": masks})
    assert metric.result() == {"mean_best_iou": 0.375, "recall@IoU0.5": 0.5, "num_entities": 2, "num_images": 1}


def test_nothing_predicted_is_nan(dataset):
    *_, scenes = dataset
    metric = EntityAP()
    for i, (_, targets) in scenes.items():
        metric.add(i, [], targets)
    with pytest.warns(UserWarning, match="no predictions"):
        result = metric.result()
    assert math.isnan(result["AP"]) and math.isnan(result["AR100"])


def test_erosion_equals_repeated_shrinking():
    rng = np.random.default_rng(0)
    mask = rng.random((37, 53)) < 0.97
    expected = mask
    for _ in range(3):
        padded = np.pad(expected, 1)
        expected = np.min([padded[y : y + 37, x : x + 53] for y in range(3) for x in range(3)], axis=0)
    assert expected.any()
    np.testing.assert_array_equal(erode(mask, 3), expected)


def change(preds, **fields):
    preds = copy.deepcopy(preds)
    preds[3].update(fields)
    return preds


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: change(p, image_id=999), "999.*another split"),
        (lambda p: change(p, score=float("nan")), "image_id 1.*not a finite number"),
        (lambda p: [{k: v for k, v in r.items() if k != "score"} for r in p], "'score' is missing"),
        (lambda p: change(p, segmentation=rle.empty((40, 51)) | {"counts": "`;"}), "image 1, record 3: RLE size"),
        (lambda p: change(p, segmentation={"size": [40, 50], "counts": "`;"}), "image 1, record 3: RLE runs fill"),
        (lambda p: {"x": 1}, "JSON list"),
    ],
    ids=["other_split", "nan", "no_score", "size", "corrupt", "not_results"],
)
def test_bad_predictions_are_refused(dataset, tmp_path, make, message):
    folder, _, preds, _ = dataset
    path = tmp_path / "pred.json"
    path.write_text(json.dumps(make(preds)))
    with pytest.raises((EvaluationError, MaskError), match=message):
        coco.entity_ap(folder / "gt.json", path)


def test_bad_files_are_refused(dataset, tmp_path):
    folder, *_ = dataset
    path = tmp_path / "pred.json"
    with pytest.raises(EvaluationError, match="no such file"):
        coco.entity_ap(folder / "gt.json", path)
    path.write_text("")
    with pytest.raises(EvaluationError, match="is empty"):
        coco.entity_ap(folder / "gt.json", path)
    path.write_text("{")
    with pytest.raises(EvaluationError, match="not valid JSON"):
        coco.entity_ap(folder / "gt.json", path)


def test_repeated_prediction_counts_twice_as_in_the_official_tool(dataset, tmp_path):
    folder, _, preds, _ = dataset
    path = tmp_path / "pred.json"
    path.write_text(json.dumps(preds + [preds[0]]))
    with pytest.warns(UserWarning, match="image_id 1 has the same prediction twice"):
        metric = coco.entity_ap(folder / "gt.json", path)
    assert metric.num_predictions() == len(preds) + 1


def test_panoptic_input_is_checked():
    metric = PanopticQuality([{"id": 1}, {"id": 2}, {"id": 3}])
    (pred, pred_records), target = panoptic_image(0)
    with pytest.raises(EvaluationError, match="image 7: predicted segment .* is in the PNG but not"):
        metric.add(7, (pred, pred_records[1:]), target)
    with pytest.raises(EvaluationError, match="image 7: predicted segment 99 is in segments_info but not"):
        metric.add(7, (pred, pred_records + [{"id": 99, "category_id": 1}]), target)
    with pytest.raises(EvaluationError, match="unknown category_id 12"):
        metric.add(7, (pred, pred_records[:-1] + [pred_records[-1] | {"category_id": 12}]), target)
    with pytest.raises(EvaluationError, match="image 7: prediction has"):
        metric.add(7, (pred[:-1], pred_records), target)


@pytest.fixture
def panoptic_files(tmp_path):
    """Ground truth and prediction of two images in the official layout."""
    for side in ("gt", "pred"):
        (tmp_path / side).mkdir()
        records = []
        for i in range(2):
            ids, segments = panoptic_image(i)[side == "gt"]
            Image.fromarray(np.stack([ids, ids * 0, ids * 0], -1).astype(np.uint8)).save(tmp_path / side / f"{i}.png")
            records.append({"image_id": i, "file_name": f"{i}.png", "segments_info": segments})
        content = {"annotations": records, "images": [{"id": 0}, {"id": 1}]}
        content["categories"] = [{"id": c, "isthing": 1} for c in (1, 2, 3)]
        (tmp_path / f"{side}.json").write_text(json.dumps(content))
    return tmp_path / "gt.json", tmp_path / "pred.json"


@pytest.mark.parametrize(
    "change_records, message",
    [
        (lambda r: r[:1], "image_id 1 has no prediction"),
        (lambda r: r + [r[0]], "image_id 0 has two predictions"),
        (lambda r: r + [r[0] | {"image_id": 7}], "image_id 7 .* is not in .*another split"),
        (lambda r: [r[0] | {"file_name": "none.png"}, r[1]], "no such file: .*none.png"),
    ],
    ids=["missing", "twice", "other_split", "no_png"],
)
def test_bad_panoptic_files_are_refused(panoptic_files, change_records, message):
    gt, pred = panoptic_files
    assert label_maps.panoptic_quality(gt, pred).result()["PQ"] > 0.1
    content = json.loads(pred.read_text())
    content["annotations"] = change_records(content["annotations"])
    pred.write_text(json.dumps(content))
    with pytest.raises(EvaluationError, match=message):
        label_maps.panoptic_quality(gt, pred)


def test_folders_must_hold_the_same_names(tmp_path):
    for side, names in (("gt", "ab"), ("pred", "bc")):
        (tmp_path / side).mkdir()
        for name in names:
            Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / side / f"{name}.png")
    with pytest.raises(EvaluationError, match="a.png has no prediction .1 missing, 1 unknown"):
        label_maps.semantic_iou(tmp_path / "gt", tmp_path / "pred", num_classes=2)
    with pytest.raises(EvaluationError, match="no such folder"):
        label_maps.dichotomous(tmp_path / "gt", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match="holds no .png files"):
        label_maps.semantic_iou(tmp_path / "gt", tmp_path / "empty", num_classes=2)


def test_semantic_input_is_checked():
    metric = SemanticIoU(3)
    with pytest.raises(EvaluationError, match="image a: prediction label 3"):
        metric.add("a", np.full((2, 2), 3), np.zeros((2, 2), int))
    with pytest.raises(EvaluationError, match="image a: prediction has shape"):
        metric.add("a", np.zeros((2, 3), int), np.zeros((2, 2), int))


def test_masks_of_another_size_are_refused():
    metric = EntityAP()
    with pytest.raises(EvaluationError, match="image 5: predicted masks are"):
        metric.add(5, {"masks": np.ones((1, 3, 3), bool)}, {"masks": np.ones((1, 4, 3), bool)})


def test_command_writes_everything(dataset, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder, *_ = dataset
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        status = cli.main(
            ["evaluate", "coco-ap", "--gt", str(folder / "gt.json"), "--pred", str(folder / "pred.json")]
            + ["--json", str(tmp_path / "out.json"), "--curves", str(tmp_path / "curves"), "--markdown", "ours"]
        )
    assert status == 0
    result = json.loads((tmp_path / "out.json").read_text())
    printed = capsys.readouterr().out
    assert f"| ours | {100 * result['AP']:.1f} |" in printed
    names = {p.name for p in (tmp_path / "curves").iterdir()}
    assert names == {"precision_recall.png", "recall_over_iou.png", "AP_per_category.png"}


def test_command_reports_bad_input_in_one_line(dataset, capsys):
    folder, *_ = dataset
    status = cli.main(["evaluate", "entity-ap", "--gt", str(folder / "gt.json"), "--pred", "missing.json"])
    assert status == 1
    assert capsys.readouterr().err == "esg evaluate: no such file: missing.json\n"


def test_command_averages_results(tmp_path, capsys):
    for name, value in (("a", 0.25), ("b", 0.75)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"AP": value}))
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert cli.main(["evaluate", "average", *files, "--json", str(tmp_path / "out" / "mean.json")]) == 0
    assert json.loads((tmp_path / "out" / "mean.json").read_text())["average"] == 0.5
    assert cli.main(["evaluate", "average", *files, "--set", "odinw13"]) == 1


def test_accumulate_in_process_equals_loop(dataset):
    *_, scenes = dataset
    items = [(i, *records) for i, records in scenes.items()]
    metric = accumulate(EntityAP(), items, coco.add_instances, show=False)
    assert len(metric) == len(scenes)
