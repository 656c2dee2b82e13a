"""Evaluation of grounding: official files to questions, answers of a tiny GELLA to files, files to numbers."""

import json
import pickle
import re

import numpy as np
import pytest
from PIL import Image

from esg_jax.evaluation import EvaluationError
from esg_jax.evaluation import main as evaluation
from esg_jax.evaluation.tasks import EntityTask, InstanceTask, NarrativeTask, PanopticTask, ReferringTask
from esg_jax.evaluation.tasks.grounder_task import GrounderTask
from esg_jax.inference.bundle import open_bundle
from esg_jax.masks import rle
from esg_jax.weights import save_weights

SIZE = (40, 60)
CAPTION = "a red dog and cats on grass"


def labels_of(image):
    """1 dog, 2 and 3 cats, 4 grass."""
    labels = np.full(SIZE, 4, np.uint8)
    labels[:20, :20], labels[:20, 25:40], labels[:20, 45:] = 1, 2, 3
    return np.roll(labels, 5 * image, axis=0)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two photographs with a narrative, expressions, panoptic and instance masks; the second also as ReasonSeg."""
    root = tmp_path_factory.mktemp("sets")
    for folder in ("panoptic", "masks", "reason"):
        (root / folder).mkdir()
    images, segments, instances, narratives, references = [], [], [], [], []
    for i in (1, 2):
        name, labels = f"{i}.png", labels_of(i)
        pixels = np.random.default_rng(i).integers(0, 256, (*SIZE, 3), np.uint8)
        Image.fromarray(pixels).save(root / name)
        Image.fromarray(np.stack([labels, 0 * labels, 0 * labels], -1)).save(root / "panoptic" / name)
        Image.fromarray(labels if i == 1 else 0 * labels).save(root / "masks" / name)  # a segmenter that fails on 2
        images.append({"id": i, "file_name": name, "height": SIZE[0], "width": SIZE[1]})
        info = [{"id": k, "category_id": c, "iscrowd": 0} for k, c in ((1, 10), (2, 20), (3, 20), (4, 30))]
        segments.append({"image_id": i, "file_name": name, "segments_info": info})
        for k, code in enumerate(map(rle.to_json, rle.encode_labels(labels, 4)), start=1):
            instances.append({"id": 10 * i + k, "image_id": i, "category_id": info[k - 1]["category_id"], "iscrowd": 0,
                              "area": int((labels == k).sum()), "segmentation": code})  # fmt: skip
        words = [("a", []), ("red dog", ["1"]), ("and", []), ("cats", ["2", "3"]), ("on", []), ("grass", ["4"])]
        narratives.append({"image_id": str(i), "annotator_id": 7, "caption": CAPTION, "segments": [
            {"utterance": t, "segment_ids": ids, "plural": t == "grass", "noun": bool(ids)} for t, ids in words
        ]})  # fmt: skip
        sentences = [{"sent_id": 100 * i + k, "sent": text} for k, text in enumerate(("the dog", "red dog"))]
        references.append({"ref_id": i, "ann_id": 10 * i + 1, "image_id": i, "split": "val", "sentences": sentences})
    categories = [{"id": 10, "name": "dog", "isthing": 1}, {"id": 20, "name": "cat", "isthing": 1},
                  {"id": 30, "name": "grass-merged", "isthing": 0}]  # fmt: skip
    coco = {"images": images, "categories": categories}
    (root / "panoptic.json").write_text(json.dumps({**coco, "annotations": segments}))
    (root / "instances.json").write_text(json.dumps({**coco, "annotations": instances}))
    (root / "png.json").write_text(json.dumps(narratives))
    (root / "refs(unc).p").write_bytes(pickle.dumps(references, protocol=2))
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(root / "reason" / "r.jpg")
    shapes = [{"label": "target", "points": [[0, 0], [29, 0], [29, 39], [0, 39]]},
              {"label": "ignore", "points": [[20, 0], [29, 0], [29, 39], [20, 39]]}]  # fmt: skip
    (root / "reason" / "r.json").write_text(json.dumps({"text": ["what barks"], "shapes": shapes}))
    (root / "masks" / "r.npy").write_bytes(b"")
    np.save(root / "masks" / "r.npy", labels_of(0))
    return root


def config(root, what, **changes):
    fields = {
        "narrative": {"reader": "png", "captions": f"{root}/png.json", "annotations": f"{root}/panoptic.json"},
        "referring": {"reader": "refcoco", "captions": f"{root}/refs(unc).p", "split": "val"},
        "reasoning": {"reader": "reasonseg", "captions": f"{root}/reason", "input_masks": f"{root}/masks"},
        "panoptic": {"annotations": f"{root}/panoptic.json"},
        "instance": {"annotations": f"{root}/instances.json"},
    }[what]
    task = {
        "narrative": NarrativeTask, "referring": ReferringTask, "reasoning": ReferringTask, "panoptic": PanopticTask,
        "instance": InstanceTask,
    }[what]  # fmt: skip
    images = "" if what == "reasoning" else str(root)
    return task(**{"images": images, "grid_images": 2, **fields, **changes})


def score(task, files):
    return task.score(task.truth(), files)["metrics"]


def write(tmp_path, records):
    (tmp_path / "predictions.json").write_text(json.dumps(records))
    return [tmp_path / "predictions.json"]


def code(mask):
    out = rle.encode(mask[None])[0]
    return rle.to_json(out)


def test_narratives_by_hand(root, tmp_path):
    """The dog is half right, the cats are one of two, the grass is perfect."""
    records = []
    for i in (1, 2):
        labels = labels_of(i)
        half = (labels == 1) & (np.arange(60) < 10)
        masks = (half, labels == 2, labels == 4)
        records.append({"image_id": f"{i}_7", "phrases": [{"pred": code(mask)} for mask in masks]})
    result = score(config(root, "narrative"), write(tmp_path, records))
    cats = 0.5  # both cats are 20 x 15 pixels
    assert result["num_phrases"] == 6
    for name, value in {
        "AR": (0.5 + cats + 1) / 3, "AR_Th": (0.5 + cats) / 2, "AR_St": 1, "AR_Sing": 0.75, "AR_Pl": cats,
    }.items():  # fmt: skip
        assert result[name] == pytest.approx(value, abs=1e-4), name
        assert name != "AR" or result[name] == pytest.approx(result["mean_iou"], abs=1e-4)  # the area under the curve
    result = score(config(root, "narrative", plural_by="flag"), write(tmp_path, records))
    assert result["AR_Pl"] == pytest.approx(1, abs=1e-4)
    whole = score(config(root, "narrative", max_images=1), write(tmp_path, records[:1]))
    assert whole["num_phrases"] == 3
    with pytest.raises(EvaluationError, match="image_id 2_7 is in only one of"):
        score(config(root, "narrative"), write(tmp_path, records[:1]))
    with pytest.raises(EvaluationError, match=r"image_id 1_7: 3 phrases in .*png.json, 2 in"):
        records[0]["phrases"].pop()
        score(config(root, "narrative"), write(tmp_path, records))


def test_listed_phrases_are_aligned(root, tmp_path):
    records = []
    for i in (1, 2):
        labels = labels_of(i)
        listed = [("the dogs", labels == 1), ("a table", labels == 2), ("green grass", labels == 4)]
        phrases = [{"text": text, "pred": code(mask)} for text, mask in listed]
        records.append({"image_id": f"{i}_7", "phrases": phrases if i == 1 else []})
    made = config(root, "narrative", phrases="generated")
    result = score(made, write(tmp_path, records))
    assert result["AR"] == pytest.approx(2 / 6, abs=1e-4) and result["AR_text_strict"] == pytest.approx(2 / 6)
    assert set(made.columns) <= set(result)


def test_expressions_by_hand(root, tmp_path):
    """One mask of 400 pixels per sentence: found twice, half found, not found."""
    records = []
    for i, texts in ((1, (0, 1)), (2, (0, 1))):
        for k in texts:
            dog = labels_of(i) == 1
            mask = dog if i == 1 else (dog & (np.arange(60) < 10) if k else np.zeros(SIZE, bool))
            records.append({"image_id": f"{100 * i + k}", "items": [{"pred": code(mask)}]})
    result = score(config(root, "referring"), write(tmp_path, records))
    expected = {"cIoU": 1000 / 1600, "gIoU": 2.5 / 4, "mIoU": 2.5 / 4, "P@0.5": 0.5}
    assert {name: result[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_ignored_pixels_do_not_count(root, tmp_path):
    mask = np.zeros(SIZE, bool)
    mask[:, :30] = True
    files = write(tmp_path, [{"image_id": "r_0", "items": [{"pred": code(mask)}]}])
    result = score(config(root, "reasoning"), files)
    assert result["gIoU"] == pytest.approx(1) and result["total_union"] == 20 * 40


def test_what_is_refused(root, tmp_path):
    for made, message in (
        (config(root, "narrative", reader="refcoco", captions=f"{root}/refs(unc).p", annotations="", split="val"),
         "reader 'refcoco' gives expressions; task 'narrative' is for captions"),
        (config(root, "referring", reader="png", captions=f"{root}/png.json", annotations=f"{root}/panoptic.json"),
         "reader 'png' gives captions"),
    ):  # fmt: skip
        with pytest.raises(EvaluationError, match=re.escape(message)):
            made.truth()
    with pytest.raises(EvaluationError, match="input_masks is 'gt'; choose ground_truth, segmenter, or"):
        config(root, "narrative", input_masks="gt").input_entities()
    with pytest.raises(EvaluationError, match="annotates only what is asked for; ground text in masks of everything"):
        config(root, "reasoning", input_masks="ground_truth").input_entities().check(False, "file")
    with pytest.raises(EvaluationError, match=re.escape("needs --config.reader=NAME and --config.captions=FILE")):
        NarrativeTask()
    with pytest.raises(EvaluationError, match="phrases is 'free'; choose one of forced, generated"):
        config(root, "narrative", phrases="free")


# With a model.


@pytest.fixture(scope="module")
def tiny_file(tiny_gella, tmp_path_factory):
    path = tmp_path_factory.mktemp("gella") / "gella.safetensors"
    save_weights(path, tiny_gella)
    return path


@pytest.fixture
def evaluate(monkeypatch, grounder, tiny_file, tmp_path):
    """`evaluate(config)` -> predictions and scores; the model is compiled already."""
    monkeypatch.setattr(GrounderTask, "grounder", lambda *_: grounder)

    def call(made):
        files = evaluation.predict(made, open_bundle(tiny_file), tmp_path)
        scores = evaluation.score(made, files, tmp_path)["metrics"]
        assert {name: scores[name] for name in made.columns}
        assert Image.open(tmp_path / "grid.png").size[0] > 100
        assert json.loads((tmp_path / "results.json").read_text())["config"]["type"] == type(made).__name__
        return json.loads(files[0].read_text()), scores

    return call


@pytest.mark.slow
def test_narratives(evaluate, root, grounder):
    """Random weights choose at random, but always one of the given masks, and the same as without files."""
    made = config(root, "narrative")
    records, scores = evaluate(made)
    assert [record["image_id"] for record in records] == ["1_7", "2_7"] and scores["num_phrases"] == 6
    images = made.truth().content.images
    scenes = made.input_entities().scenes(grounder, [image.record for image in images])
    plural = [False, False, True]  # by the annotators' flag
    results = grounder.ground(scenes, [CAPTION] * 2, [["red dog", "cats", "grass"]] * 2, [plural] * 2)
    for record, result, scene in zip(records, results, scenes, strict=True):
        assert [phrase["pred"] for phrase in record["phrases"]] == [scene.rle(p.entities) for p in result.phrases]
        assert len(result.phrases[0].entities) == 1
    predicted, scores = evaluate(config(root, "narrative", input_masks=f"{root}/masks"))
    assert not rle.areas([phrase["pred"] for phrase in predicted[1]["phrases"]]).any()  # an image without masks
    assert scores["num_phrases"] == 6


@pytest.mark.slow
def test_expressions_and_questions(evaluate, root):
    records, scores = evaluate(config(root, "referring"))
    assert [record["image_id"] for record in records] == ["100", "101", "200", "201"] and scores["num_items"] == 4
    records, scores = evaluate(config(root, "reasoning"))
    assert scores["num_items"] == 1 and records[0]["items"][0]["pred"]["size"] == list(SIZE)


@pytest.mark.slow
def test_a_text_longer_than_the_context(evaluate, root, tmp_path):
    references = pickle.loads((root / "refs(unc).p").read_bytes())
    references[0]["sentences"][0]["sent"] = "dog " * 200
    (tmp_path / "refs.p").write_bytes(pickle.dumps(references, protocol=2))
    made = config(root, "referring", captions=f"{tmp_path}/refs.p", annotations=f"{root}/instances.json")
    with pytest.raises(
        EvaluationError, match=r"refs\.p, texts of 1\.png: the text takes \d+ tokens .* the 128 allowed"
    ):
        evaluate(made)


@pytest.mark.slow
def test_categories(evaluate, root, tmp_path):
    records, scores = evaluate(config(root, "panoptic"))
    assert [record["image_id"] for record in records["annotations"]] == [1, 2] and 0 <= scores["PQ"] <= 1
    empty, scores = evaluate(config(root, "panoptic", input_masks=f"{root}/masks"))
    assert empty["annotations"][1]["segments_info"] == []
    records, scores = evaluate(config(root, "instance"))
    assert {record["category_id"] for record in records} <= {10, 20, 30} and {r["image_id"] for r in records} == {1, 2}


@pytest.mark.slow
def test_a_task_that_is_not_gellas(root, tiny_file, tmp_path):
    made = EntityTask(annotations=f"{root}/instances.json", images=str(root))
    with pytest.raises(ValueError, match="holds a GELLA, which finds no entities"):
        evaluation.predict(made, open_bundle(tiny_file), tmp_path)
