"""RefCOCO family and ReasonSeg on tiny files, and entity masks that come from elsewhere."""

import json
import os
import pickle
import re

import numpy as np
import pytest
from PIL import Image

from data import refer_images
from esg_jax.input.grounding import ExampleMaker, GroundingDataConfig, train_dataset
from esg_jax.input.grounding_readers import open_narratives
from esg_jax.input.narratives import GroundingSourceConfig, linked_by_overlap
from esg_jax.input.records import Entities
from esg_jax.masks import MaskSet, rle
from esg_jax.text.prompts import Prompts
from esg_jax.text.sequences import SequenceBuilder
from tests.text.byte_tokenizer import ByteTokenizer

HEIGHT, WIDTH = 24, 36


def labels_of(image):
    labels = np.ones((HEIGHT, WIDTH), np.uint8)
    labels[12:, :18], labels[12:, 18:] = 2, 3
    return np.roll(labels, 3 * image, axis=1)


def reference(number, image, masks, split, *sentences, **more):
    sentences = [{"sent_id": 10 * number + k, "sent": text, "raw": text} for k, text in enumerate(sentences)]
    name = f"COCO_train2014_{image:012d}_{number}.jpg"
    ids = {"ref_id": number, "ann_id": masks, "image_id": image, "file_name": name, "split": split}
    return {**ids, "sentences": sentences, "sent_ids": [s["sent_id"] for s in sentences], **more}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two photographs with three masks each, and expressions about them in both layouts."""
    root = tmp_path_factory.mktemp("refcoco")
    (root / "found").mkdir()
    images, annotations = [], []
    for image in (1, 2):
        name, labels = f"COCO_train2014_{image:012d}.jpg", labels_of(image)
        Image.fromarray(np.full((HEIGHT, WIDTH, 3), 90 * image, np.uint8)).save(root / name)
        images.append({"id": image, "file_name": name, "height": HEIGHT, "width": WIDTH})
        for k, code in enumerate(map(rle.to_json, rle.encode_labels(labels, 3)), start=1):
            entry = {"id": 10 * image + k, "image_id": image, "category_id": 1, "iscrowd": 0, "segmentation": code}
            annotations.append(entry)
        parts = labels.copy()  # a segmenter that cuts mask 1 in two
        parts[:6][parts[:6] == 1] = 7
        Image.fromarray(parts).save(root / "found" / f"COCO_train2014_{image:012d}.png")
    coco = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (root / "instances.json").write_text(json.dumps(coco))
    references = [
        reference(1, 1, 11, "train", "top one", "the upper thing"),
        reference(2, 2, 22, "testA", "left caf\xe9"),
        reference(3, 1, 13, "testA", "lower right"),
    ]
    (root / "refs(unc).p").write_bytes(pickle.dumps(references, protocol=2))
    general = [
        reference(1, 1, [12, 13], "val", "both below"),
        reference(2, 2, [-1], "val", "a zebra", no_target=True),
        reference(3, 2, [21], "train", "top"),
    ]
    (root / "grefs(unc).json").write_text(json.dumps(general))
    return root


def source(root, file="refs(unc).p", **changes):
    return GroundingSourceConfig(**{"reader": "refcoco", "captions": str(root / file), **changes})


def test_refcoco(root):
    narratives = open_narratives(source(root, split="testA"))
    assert [(n.caption, n.caption_id, n.kind) for n in narratives] == [
        ("left caf\xe9", 20, "expression"), ("lower right", 30, "expression"),
    ]  # fmt: skip
    for narrative, image, mask in zip(narratives, (2, 1), (2, 3), strict=True):
        assert narrative.record.image_id == image and narrative.record.load_image().shape == (HEIGHT, WIDTH, 3)
        (phrase,) = narrative.phrases
        assert (phrase.text, phrase.start, phrase.end) == (narrative.caption, 0, len(narrative.caption))
        np.testing.assert_array_equal(
            narrative.record.load_entities().mask(phrase.entities[0]), labels_of(image) == mask
        )
    assert len(open_narratives(source(root, split="train"))) == 2  # every sentence


def test_images_that_are_evaluated_on(root, tmp_path, capsys):
    out = tmp_path / "eval.txt"
    assert refer_images.main([str(root / "refs(unc).p"), "--out", str(out)]) == 0
    assert out.read_text() == "1\n2\n" and "2 images" in capsys.readouterr().out
    with pytest.raises(ValueError, match="has no caption with an image that is not excluded"):
        open_narratives(source(root, split="train", exclude=str(out)))
    assert refer_images.main(["none.p", "--out", str(out)]) == 1 and "none.p" in capsys.readouterr().err


def test_grefcoco(root):
    narratives = open_narratives(source(root, "grefs(unc).json", split="val"))
    assert narratives.kind == "question" and [n.phrases[0].entities for n in narratives] == [(1, 2), ()]
    assert narratives.num_linked.tolist() == [1, 1]  # that nothing is meant is known, too


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": ""}, "has no split ''; set `split` to one of testA, train"),
        ({"split": "test"}, "has no split 'test'"),
        ({"captions": "none.p"}, "file of references not found: none.p"),
        ({"captions": ""}, "file of references not found: (`captions` is empty)"),
    ],
)
def test_bad_settings(root, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        open_narratives(source(root, **change))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": 1}, "holds a dict, expected a list of references"),
        ([{"ann_id": 1, "image_id": 1, "split": "val"}], "reference 0 has no 'sentences'"),
        ([reference(5, 1, 21, "val", "x")], "reference 5 is linked to mask 21"),
        ([reference(5, 9, 21, "val", "x")], "reference 5 belongs to image id 9"),
        ([reference(5, 1, 11, "val", " ")], "reference 5: sentence 50 is empty"),
    ],
)
def test_bad_references(root, tmp_path, content, message):
    (tmp_path / "refs(x).p").write_bytes(pickle.dumps(content, protocol=2))
    made = source(tmp_path, "refs(x).p", split="val", annotations=str(root / "instances.json"))
    with pytest.raises(ValueError, match=re.escape(message)):
        open_narratives(made)


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_a_pickle_runs_no_code(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "refs(x).p").write_bytes(pickle.dumps([Harmful()], protocol=2))
    with pytest.raises(
        ValueError, match=r"refs\(x\).p cannot be read as a list of references: it refers to \w+.system"
    ):
        open_narratives(source(tmp_path, "refs(x).p", split="val"))
    assert not (tmp_path / "harmed").exists()
    (tmp_path / "refs(x).p").write_bytes(b"\x80\x02]q\x00")
    with pytest.raises(ValueError, match="cannot be read"):
        open_narratives(source(tmp_path, "refs(x).p", split="val"))


def box(left, top, right, bottom):
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def write_reason(folder, name="a", encoding="utf-8", **changes):
    """A photograph with a large target, a small target and ignored pixels inside of it, and a flag."""
    folder.mkdir(exist_ok=True)
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(folder / f"{name}.jpg")
    shapes = [
        {"label": "ignored_part", "points": box(4, 4, 7, 7)},
        {"label": "target", "points": box(2, 2, 19.9, 15)},
        {"label": "flag", "points": [[0, 0]]},
        {"label": "target", "points": box(25, 0, 30, 5)},
    ]
    content = {"text": ["What is it? \u2018caf\xe9\u2019", "thing"], "is_sentence": True, "shapes": shapes, **changes}
    (folder / f"{name}.json").write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
    return str(folder)


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252"])
def test_reasonseg(tmp_path, encoding):
    narratives = open_narratives(
        GroundingSourceConfig("reasonseg", captions=write_reason(tmp_path / "val", encoding=encoding))
    )
    assert [n.caption for n in narratives] == ["What is it? \u2018caf\xe9\u2019", "thing"]
    assert [n.caption_id for n in narratives] == ["a_0", "a_1"] and narratives.kind == "question"
    record = narratives[0].record
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[2:16, 2:20] = expected[0:6, 25:31] = True
    expected[4:8, 4:8] = False  # smaller, so drawn later
    np.testing.assert_array_equal(record.load_entities().mask(0), expected)
    assert record.load_ignore().sum() == 16 and record.load_ignore()[5, 5]


def test_polygons_are_drawn_as_the_reference_draws_them():
    """Close to OpenCV's outline plus filling, which may differ by the pixels of slanted edges."""
    cv2 = pytest.importorskip("cv2")
    from esg_jax.input.referring_readers import ReasonRecord

    rng = np.random.default_rng(0)
    for _ in range(5):
        angle, radius = np.sort(rng.uniform(0, 2 * np.pi, 12)), rng.uniform(30, 95, 12)
        corners = (100 + np.stack([np.cos(angle), np.sin(angle)], -1) * radius[:, None]).astype(int)
        ours = ReasonRecord(b"", "x", "x", 200, 200, ((1, tuple(map(tuple, corners.tolist()))),)).region_map() == 1
        theirs = np.zeros((200, 200), np.uint8)
        cv2.polylines(theirs, [corners.astype(np.int32)], True, 1, 1)
        cv2.fillPoly(theirs, [corners.astype(np.int32)], 1)
        assert (ours & (theirs > 0)).sum() / (ours | (theirs > 0)).sum() > 0.98


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": "why"}, "a.json needs the lists 'text' and 'shapes'"),
        ({"text": [" "]}, "a.json: text 0 is empty"),
        ({"shapes": [{"label": "target", "points": [[1, 1]]}]}, "a.json: shape 0 ('target') needs a list 'points'"),
    ],
)
def test_bad_reasonseg(tmp_path, change, message):
    made = GroundingSourceConfig("reasonseg", captions=write_reason(tmp_path / "val", **change))
    with pytest.raises(ValueError, match=re.escape(message)):
        open_narratives(made)


def test_missing_reasonseg_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="folder of a ReasonSeg split not found"):
        open_narratives(GroundingSourceConfig("reasonseg", captions=str(tmp_path / "none")))
    folder = write_reason(tmp_path / "val")
    (tmp_path / "val" / "a.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.jpg"):
        open_narratives(GroundingSourceConfig("reasonseg", captions=folder))


# As training data.


def config(sources, **changes):
    fields = {
        "sources": sources, "image_size": 32, "num_image_tokens": 4, "map_size": 32, "max_entities": 5,
        "max_phrases": 3, "lengths": (384, 384, 384), "ratios": (0, 0, 1), "batch_size": 2,
    }  # fmt: skip
    return GroundingDataConfig(**{**fields, **changes})


def example(made, narrative):
    builder = SequenceBuilder(ByteTokenizer(), Prompts.load(), 4)
    sample = ExampleMaker(2, made, builder)(narrative, np.random.default_rng(0))
    return sample, builder.text(sample["ids"][sample["answer"]]), builder.text(sample["ids"][~sample["answer"]])


def test_expressions_are_listed_and_questions_answered(root):
    made = config({"refs": source(root, split="train"), "grefs": source(root, "grefs(unc).json", split="val")})
    (first, *_), (both, nothing) = (open_narratives(s) for s in made.source_configs().values())
    sample, answer, question = example(made, first)
    assert "top one" in answer and "top one" in question
    assert sample["links"][0].tolist() == [True, False, False, False, False] and sample["linked"][0]
    sample, answer, question = example(made, both)
    assert answer == "" and question.rstrip().endswith("USER: both below ASSISTANT:") and sample["seg_valid"].sum() == 1
    assert sample["links"][0].tolist() == [False, True, True, False, False]
    sample, *_ = example(made, nothing)  # all pairs are negative
    assert not sample["links"].any() and sample["linked"].tolist() == [True, False, False]
    assert train_dataset(made, ByteTokenizer())[0]["linked"][:, 0].all()
    with pytest.raises(ValueError, match="asks for description, for which no source has captions"):
        train_dataset(config(made.sources, ratios=(1, 0, 1)), ByteTokenizer())


def test_masks_of_a_segmenter_are_linked_by_overlap(root):
    made = config({"refs": source(root, split="train", entity_masks=str(root / "found"))})
    narrative = open_narratives(made.source_configs()["refs"])[0]
    entities, (wanted,) = narrative.load_entities()
    assert entities.ids == (1, 2, 3, 7) and [entities.ids[k] for k in wanted] == [1, 7]
    sample, *_ = example(made, narrative)
    assert sample["links"][0].tolist() == [True, False, False, True, False]
    lost = open_narratives(source(root, split="train", entity_masks=str(root)))[0]
    with pytest.raises(FileNotFoundError, match=r"has no COCO_train2014_000000000001.png, .json"):
        lost.load_entities()


def test_overlap_rule():
    def entities(*masks):
        layers = [mask * np.uint8(k) for k, mask in enumerate(masks, start=1)]
        return Entities.unlabelled(MaskSet(layers, tuple(range(len(masks)))))

    row = np.arange(10)[None]
    truth = entities(row < 8)
    found = entities(row < 4, row < 3, (row >= 5) & (row < 9), row >= 7, row < 10)
    # IoU 0.5; inside; 3/4 inside; 1/3 inside; IoU 0.8.
    assert linked_by_overlap(truth, found)[0].tolist() == [True, True, True, False, True]


def test_reasonseg_needs_masks_of_everything(tmp_path):
    folder = write_reason(tmp_path / "train")
    made = config({"reason": GroundingSourceConfig("reasonseg", captions=folder)}, batch_size=1)
    with pytest.raises(
        ValueError, match=r"data.sources.reason: reasonseg annotates only what is asked for; set entity"
    ):
        train_dataset(made, ByteTokenizer())
    (tmp_path / "masks").mkdir()
    labels = np.ones((HEIGHT, WIDTH), np.uint8)
    labels[2:16, 2:20] = 2
    Image.fromarray(labels).save(tmp_path / "masks" / "a.png")
    found = GroundingSourceConfig("reasonseg", captions=folder, entity_masks=str(tmp_path / "masks"))
    batch = train_dataset(config({"reason": found}, batch_size=1), ByteTokenizer())[0]
    assert batch["links"][0, 0].tolist() == [False, True, False, False, False]
