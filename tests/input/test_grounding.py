import json
import re

import numpy as np
import pytest
from PIL import Image

from esg_jax.config import from_dict, to_dict
from esg_jax.input.grounding import (
    GroundingDataConfig,
    TaskSchedule,
    mirror_words,
    train_dataset,
    train_iterator,
)
from esg_jax.input.grounding_readers import GroundingSourceConfig, open_narratives
from esg_jax.input.records import Entities
from esg_jax.input.square import entity_map, square_labels
from esg_jax.masks import MaskSet, rle
from esg_jax.text.prompts import Prompts
from esg_jax.text.sequences import SequenceBuilder
from tests.text.byte_tokenizer import ByteTokenizer

HEIGHT, WIDTH = 40, 60
CAPTION = "A red top on the left, two blue things and a speck."


def labels_of(image):
    """Ids 1 (top), 2 (lower left), 3 (lower right), 4 (one pixel)."""
    labels = np.ones((HEIGHT, WIDTH), np.int32)
    labels[20:, :30], labels[20:, 30:], labels[31, 41] = 2, 3, 4
    return np.roll(labels, image, axis=1)


def span(text):
    start = CAPTION.index(text)
    return {"text": text, "start": start, "end": start + len(text)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Six pictures (gray value = number) with the same four entities and one caption each, in three layouts."""
    root = tmp_path_factory.mktemp("grounding")
    (root / "panoptic").mkdir()
    images, annotations, captions, panoptic, narratives, lines = [], [], [], [], [], []
    for i in range(6):
        name, labels = f"{i}.png", labels_of(i)
        Image.fromarray(np.full((HEIGHT, WIDTH, 3), 40 * i, np.uint8)).save(root / name)
        images.append({"id": 10 + i, "file_name": name, "height": HEIGHT, "width": WIDTH})
        for number, encoded in enumerate(map(rle.to_json, rle.encode_labels(labels, 4)), start=1):
            annotations.append({"id": 100 * i + number, "image_id": 10 + i, "category": "x", "segmentation": encoded})
        phrases = [
            {**span("red top"), "mask_ids": [100 * i + 1]},
            {**span("two blue things"), "mask_ids": [100 * i + 3, 100 * i + 2], "plural": True},
            {**span("speck"), "mask_ids": [100 * i + 4]},
        ]
        captions.append({"id": i, "image_id": 10 + i, "caption": CAPTION, "phrases": phrases})
        rgb = np.stack([labels, 0 * labels, 0 * labels], -1).astype(np.uint8)
        Image.fromarray(rgb).save(root / "panoptic" / name)
        Image.fromarray(labels.astype(np.uint8)).save(root / f"{i}_masks.png")
        segments = [{"id": k, "category_id": 1} for k in (1, 2, 3, 4)]
        panoptic.append({"image_id": 10 + i, "file_name": name, "segments_info": segments})
        utterances = [("a", []), ("red top", ["1"]), ("on the left", []), (",", []), ("two blue things", ["2", "3"])]
        narratives.append(
            {
                "image_id": str(10 + i),
                "caption": CAPTION if i else "something else",
                "segments": [
                    {"utterance": text, "segment_ids": ids, "plural": len(ids) > 1, "noun": bool(ids)}
                    for text, ids in utterances
                ],
            }
        )
        nouns = ["red top", "two blue things", "speck"]
        line = {"image": name, "masks": f"{i}_masks.png", "captions": [CAPTION], "nouns": [nouns]}
        lines.append(line if i % 2 else {**line, "links": [[[1], [3, 2], []]]})
    write = {
        "linked.json": {"images": images, "annotations": annotations, "captions": captions},
        "panoptic.json": {"images": images, "annotations": panoptic, "categories": [{"id": 1, "name": "x"}]},
        "png.json": narratives,
    }
    for name, content in write.items():
        (root / name).write_text(json.dumps(content))
    (root / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


def sources(root):
    return {
        "linked": {"captions": str(root / "linked.json")},
        "png": {"reader": "png", "captions": str(root / "png.json"), "annotations": str(root / "panoptic.json")},
        "own": {"reader": "entity_jsonl", "captions": str(root / "own.jsonl")},
    }


def config(root, names=("linked",), **changes):
    fields = {
        "sources": {name: sources(root)[name] for name in names},
        "image_size": 32,
        "num_image_tokens": 4,
        "map_size": 32,
        "max_entities": 5,
        "max_phrases": 4,
        "lengths": (384, 512, 512),
        "batch_size": 2,
        "seed": 3,
    }
    return GroundingDataConfig(**{**fields, **changes})


@pytest.mark.parametrize("name", ["linked", "png", "own"])
def test_readers_agree(root, name):
    source = open_narratives(from_dict(GroundingSourceConfig, sources(root)[name]))
    assert len(source) == 6
    first, second = source[2], source[1]
    assert [phrase.text for phrase in first.phrases][:2] == ["red top", "two blue things"]
    for narrative in (first, second):
        assert all(narrative.caption[p.start : p.end] == p.text for p in narrative.phrases)
    entities = first.record.load_entities()
    masks = [sum(layer == k + 1 for layer in entities.layers) for k in range(4)]
    expected = labels_of(2)
    np.testing.assert_array_equal(masks[first.phrases[0].entities[0]], expected == 1)
    both = sum(masks[k] for k in first.phrases[1].entities)
    np.testing.assert_array_equal(both, (expected == 2) | (expected == 3))
    assert first.phrases[1].plural
    if name == "own":  # lines with an odd number have no links
        assert source.num_linked.tolist() == [2, 0] * 3 and source.num_phrases.tolist() == [3] * 6
    if name == "png":  # the caption that disagrees is rebuilt from its utterances
        assert source[0].caption == "a red top on the left, two blue things"
        assert source[0].phrases[1].text == "two blue things"


def test_a_batch(root):
    tokenizer = ByteTokenizer()
    dataset = train_dataset(config(root, ratios=(0, 0, 1)), tokenizer)
    batch = dataset[0]
    shapes = {name: (array.shape, array.dtype.name) for name, array in batch.items()}
    assert shapes == {
        "image": ((2, 32, 32, 3), "uint8"), "image_size": ((2, 2), "int32"),
        "label_map": ((2, 32, 32), "int16"), "map_size": ((2, 2), "int32"),
        "ids": ((2, 512), "int32"), "answer": ((2, 512), "bool"),
        "seg_pos": ((2, 4), "int32"), "seg_valid": ((2, 4), "bool"),
        "links": ((2, 4, 5), "bool"), "linked": ((2, 4), "bool"), "task": ((2,), "int32"),
    }  # fmt: skip
    number = int(batch["image"][0, 0, 0, 0]) // 40
    assert batch["image_size"].tolist() == [[21, 32]] * 2 == batch["map_size"].tolist()
    assert (batch["image"][0, 21:] == 0).all() and (batch["label_map"][0, 21:] == 0).all()
    np.testing.assert_array_equal(batch["label_map"][0], square_labels(labels_of(number).astype(np.int16), 32)[0])
    # The speck (entity 4) has no pixel left at this size: its noun stays in the answer, without a target.
    assert batch["seg_valid"][0].tolist() == [True, True, True, False]
    assert batch["linked"][0].tolist() == [True, True, False, False]
    assert batch["links"][0].astype(int).tolist() == [[1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0] * 5, [0] * 5]
    ids, answer = batch["ids"][0], batch["answer"][0]
    assert (ids[batch["seg_pos"][0, :3]] == tokenizer.seg_id).all() and (ids == tokenizer.image_id).sum() == 4
    builder = SequenceBuilder(tokenizer, Prompts.load(), 4)
    assert builder.phrases(ids[answer]) == ["red top", "two blue things", "speck"]
    assert CAPTION in builder.text(ids[~answer])
    assert (batch["task"] == 2).all()


def test_tasks(root):
    tokenizer = ByteTokenizer()
    dataset = train_dataset(config(root), tokenizer)
    builder = SequenceBuilder(tokenizer, Prompts.load(), 4)
    tasks = np.array([int(dataset[i]["task"][0]) for i in range(12)])
    described = dataset[int(np.flatnonzero(tasks == 0)[0])]
    assert described["ids"].shape == (2, 384) and not described["seg_valid"].any() and not described["linked"].any()
    assert builder.text(described["ids"][0][described["answer"][0]]) == CAPTION
    extracted = dataset[int(np.flatnonzero(tasks == 1)[0])]
    assert extracted["seg_valid"].sum() == 6 and not extracted["linked"].any() and not extracted["links"].any()


def test_ratios_and_schedule():
    schedule = TaskSchedule((0.2, 0.2, 0.6), seed=1)
    drawn = [schedule[step] for step in range(300)]
    tasks = np.array([task for task, _ in drawn])
    assert np.bincount(tasks).tolist() == [60, 60, 180]
    for task in range(3):  # nothing is skipped or shown twice
        assert [index for other, index in drawn if other == task] == list(range((tasks == task).sum()))
    assert drawn == [TaskSchedule((0.2, 0.2, 0.6), seed=1)[step] for step in range(300)]
    assert tasks.tolist() != [TaskSchedule((0.2, 0.2, 0.6), seed=2)[step][0] for step in range(300)]
    thirds = TaskSchedule((1, 1, 1), seed=0)
    assert np.bincount([thirds[step][0] for step in range(100)]).tolist() == [34, 33, 33]


def test_resume_gives_the_same_batches(root):
    def batches(iterator, count):
        return [next(iterator) for _ in range(count)]

    first = train_iterator(config(root, ("linked", "own")), ByteTokenizer())
    batches(first, 3)
    state = first.get_state()
    wanted = batches(first, 4)
    first.close()
    second = train_iterator(config(root, ("linked", "own")), ByteTokenizer())
    second.set_state(state)
    for ours, theirs in zip(batches(second, 4), wanted, strict=True):
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    second.close()


def test_hosts_share_the_task_and_split_the_samples(root):
    one = train_dataset(config(root, batch_size=4), ByteTokenizer())
    hosts = [train_dataset(config(root, batch_size=4), ByteTokenizer(), k, 2) for k in (0, 1)]
    for step in range(5):
        whole, parts = one[step], [host[step] for host in hosts]
        for name in whole:
            together = np.stack([part[name] for part in parts], 1).reshape(whole[name].shape)
            np.testing.assert_array_equal(together, whole[name], err_msg=name)


def test_long_captions_lose_their_end_with_its_phrases(root):
    tokenizer = ByteTokenizer()
    whole = train_dataset(config(root, ratios=(0, 0, 1)), tokenizer)[0]["ids"][0]
    length = int((whole != tokenizer.pad_id).sum()) - 20
    batch = train_dataset(config(root, ratios=(0, 0, 1), lengths=(length,) * 3), tokenizer)[0]
    builder = SequenceBuilder(tokenizer, Prompts.load(), 4)
    phrases = builder.phrases(batch["ids"][0][batch["answer"][0]])
    assert 0 < len(phrases) < 3 and phrases == ["red top", "two blue things"][: len(phrases)]
    assert builder.text(batch["ids"][0][batch["answer"][0]]).endswith(".")  # the answer is whole
    with pytest.raises(ValueError, match=r"data.lengths: 64 tokens are too few"):
        train_dataset(config(root, ratios=(0, 0, 1), lengths=(64, 64, 64)), tokenizer)[0]


def test_flip(root):
    assert mirror_words("Left of the right, copyright") == "Right of the left, copyright"
    tokenizer = ByteTokenizer()
    plain, flipped = (train_dataset(config(root, ratios=(0, 0, 1), hflip=p), tokenizer)[0] for p in (0.0, 1.0))
    np.testing.assert_array_equal(flipped["label_map"][0, :21], plain["label_map"][0, :21, ::-1])
    text = SequenceBuilder(tokenizer, Prompts.load(), 4).text(flipped["ids"][0])
    assert "on the right" in text and "on the left" not in text


def test_entity_map_rules():
    labels = np.zeros((2, 8, 8), np.uint8)
    labels[0] = 1  # everything
    labels[1, 2:6, 2:6] = 2
    labels[1, 0, 0] = 3
    crowd = np.array([False, False, True])
    entities = Entities(layers=list(labels), labels=np.zeros(3, np.int32), crowd=crowd, ids=(1, 2, 3))
    label_map, size, slots = entity_map(entities, 32, 5)
    assert size.tolist() == [32, 32] and slots.tolist() == [0, 1, -1]
    np.testing.assert_array_equal(label_map, np.kron(np.where(labels[1] == 2, 2, 1), np.ones((4, 4), int)))
    # The largest is kept; entities without any pixel get no slot.
    assert entity_map(entities, 32, 1)[2].tolist() == [0, -1, -1]
    covered = Entities.unlabelled(MaskSet([np.ones((8, 8), np.uint8), np.full((8, 8), 2)], (1, 2)))
    assert entity_map(covered, 32, 5)[2].tolist() == [-1, 1]


def test_settings_survive_the_command_line(root):
    made = config(root, ("linked", "png"))
    assert from_dict(GroundingDataConfig, json.loads(json.dumps(to_dict(made)))) == made


def changed(root, tmp_path, file, edit):
    content = json.loads((root / file).read_text())
    edit(content)
    (tmp_path / file).write_text(json.dumps(content))
    return str(tmp_path / file)


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("linked", lambda c: c["captions"][0]["phrases"][0].update(mask_ids=[77]),
         "caption 0, phrase 'red top' is linked to mask 77, which"),
        ("linked", lambda c: c["captions"][1].update(image_id=5), "caption 1 belongs to image id 5, which"),
        ("linked", lambda c: c["captions"][2]["phrases"][1].update(start=0),
         "caption 2: phrase 'two blue things' is not at characters 0..38 of"),
        ("linked", lambda c: c["captions"][2].pop("phrases"), "caption 2 has no 'phrases'"),
        ("linked", lambda c: c.pop("captions"), "has no list 'captions'"),
        ("linked", lambda c: c["captions"].clear(), "has no caption"),
        ("png", lambda c: c[3]["segments"][1].update(segment_ids=["9"]),
         "narrative 3 (image 13), phrase 'red top' is linked to mask 9, which"),
        ("png", lambda c: c[3].pop("segments"), "narrative 3 has no 'segments'"),
    ],
)  # fmt: skip
def test_bad_captions(root, tmp_path, name, edit, message):
    file = changed(root, tmp_path, f"{name}.json", edit)
    source = {**sources(root)[name], "captions": file, "images": str(root)}
    with pytest.raises(ValueError, match=re.escape(message)):
        open_narratives(from_dict(GroundingSourceConfig, source))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda e: e.update(nouns=[["a zebra"]], links=[[[]]]), "line 1: noun 'a zebra' does not occur in caption 1"),
        (lambda e: e.update(nouns=[]), "line 1 has 1 captions, 0 lists of nouns"),
        (lambda e: e.update(links=[[[1], [9], []]]), "noun 'two blue things' has mask id 9, which 0_masks.png lacks"),
        (lambda e: e.pop("masks"), "line 1 has no 'masks'"),
    ],
)
def test_bad_lines(root, tmp_path, edit, message):
    entry = json.loads((root / "own.jsonl").read_text().splitlines()[0])
    edit(entry)
    (tmp_path / "own.jsonl").write_text(json.dumps(entry))
    source = GroundingSourceConfig("entity_jsonl", str(tmp_path / "own.jsonl"), images=str(root))
    with pytest.raises(ValueError, match=re.escape(message)):
        open_narratives(source)


def test_missing_image_and_files(root, tmp_path):
    edit = lambda c: [image.update(file_name="gone.png") for image in c["images"]]  # noqa: E731
    file = changed(root, tmp_path, "linked.json", edit)
    made = config(root, ratios=(0, 0, 1), sources={"linked": {"captions": file, "images": str(root)}})
    with pytest.raises(FileNotFoundError, match=r"image file not found: .*gone.png"):
        train_dataset(made, ByteTokenizer())[0]
    with pytest.raises(FileNotFoundError, match="annotation file not found"):
        open_narratives(GroundingSourceConfig(captions=str(tmp_path / "none.json")))


def test_excluded_images(root, tmp_path):
    (tmp_path / "exclude.txt").write_text("10\n12\n")
    for name in ("linked", "png"):
        source = from_dict(GroundingSourceConfig, {**sources(root)[name], "exclude": str(tmp_path / "exclude.txt")})
        assert [open_narratives(source)[k].record.image_id for k in range(4)] == [11, 13, 14, 15]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratios": (0.5, 0.5)}, "data.ratios needs one value for each"),
        ({"ratios": (0, 0, 0)}, "data.ratios are (0, 0, 0)"),
        ({"map_size": 100}, "data.map_size is 100"),
        ({"sampling": "per_epoch"}, "data.sampling is 'per_epoch'; choose per_step or per_sample"),
        ({"sources": {"a": {"kaptions": "x"}}}, "data.sources.a"),
        ({"sources": {"a": {"tasks": ("sleep",)}}}, "unknown task 'sleep'"),
    ],
)
def test_bad_settings(root, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(root, **changes)


def test_no_source_for_a_task(root):
    source = {"linked": {**sources(root)["linked"], "tasks": ["grounding"]}}
    with pytest.raises(ValueError, match="asks for description, for which no source has captions"):
        train_dataset(config(root, sources=source), ByteTokenizer())
    with pytest.raises(ValueError, match="does not divide among 3 hosts"):
        train_dataset(config(root), ByteTokenizer(), 0, 3)


def test_tasks_per_sample(root):
    """Every sample has its own task, in the same ratios, and all have the same arrays, on any number of hosts."""
    made = config(root, sampling="per_sample", batch_size=4, ratios=(0.2, 0.3, 0.5))
    whole = train_dataset(made, ByteTokenizer())
    batches = [whole[step] for step in range(25)]
    tasks = np.stack([batch["task"] for batch in batches])
    assert np.bincount(tasks.ravel()).tolist() == [20, 30, 50]
    schedule = TaskSchedule(made.ratios, made.seed)
    assert tasks.ravel().tolist() == [schedule[sample][0] for sample in range(100)]
    for batch in batches:
        assert batch["ids"].shape == (4, 512)
        np.testing.assert_array_equal(batch["reconstruct"], batch["task"] != 0)
        np.testing.assert_array_equal(batch["linked"].any(1), batch["task"] == 2)
        np.testing.assert_array_equal(batch["seg_valid"].any(1), batch["task"] != 0)
        assert batch["answer"].any(1).all()
    hosts = [train_dataset(made, ByteTokenizer(), k, 2) for k in (0, 1)]
    for step in range(3):
        for name, array in batches[step].items():
            together = np.stack([host[step][name] for host in hosts], 1).reshape(array.shape)
            np.testing.assert_array_equal(together, array, err_msg=name)


def test_the_nearest_resize_makes_no_new_label():
    labels = np.random.default_rng(0).choice([0, 3, 40, 250], (37, 53)).astype(np.int16)
    for side in (32, 64, 256):
        resized, size = square_labels(labels, side)
        assert set(np.unique(resized)) <= {0, 3, 40, 250} and resized[: size[0], : size[1]].any()
        assert not resized[size[0] :].any() and not resized[:, size[1] :].any()


def test_captions_of_other_images(root, tmp_path):
    """Their nouns mean nothing here, unless a word of them is also said of this image."""
    content = json.loads((root / "linked.json").read_text())
    for number, caption in enumerate(content["captions"]):
        if number % 2:
            text = "A person beside red cows."
            phrases = [{"text": "A person", "start": 0, "end": 8}, {"text": "red cows", "start": 16, "end": 24}]
            extra = {"plural": False, "mask_ids": caption["phrases"][0]["mask_ids"]}
            caption |= {"caption": text, "phrases": [phrase | extra for phrase in phrases]}
    for image in content["images"]:
        image["file_name"] = str(root / image["file_name"])
    (tmp_path / "linked.json").write_text(json.dumps(content))
    tokenizer = ByteTokenizer()
    fields = {"ratios": (0, 0, 1), "batch_size": 1, "sources": {"x": {"captions": str(tmp_path / "linked.json")}}}
    plain, shuffled = (train_dataset(config(root, mismatched=p, **fields), tokenizer) for p in (0.0, 0.999))
    kinds = set()
    for step in range(24):
        (links,), (linked,), (valid,) = (shuffled[step][name] for name in ("links", "linked", "seg_valid"))
        assert not links.any() and not linked[~valid].any()
        assert plain[step]["links"].any() and plain[step]["image"].shape == shuffled[step]["image"].shape
        kinds.add((int(valid.sum()), tuple(linked[valid].tolist())))
    # "red cows" shares a word with "red top", so under that caption's image it counts for nothing, as all of its own.
    assert (2, (True, False)) in kinds and (2, (False, False)) in kinds, kinds
    with pytest.raises(ValueError, match="data.mismatched is 1"):
        config(root, mismatched=1)
