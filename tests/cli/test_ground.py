"""`esg ground` with the tiny GELLA: one good run, and what goes wrong before and while it runs."""

import copy
import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from esg_jax.cli import ground, main, make_parser
from esg_jax.evaluation.formats.phrases import phrase_grounding, referring_segmentation
from esg_jax.inference.grounding import grounding_files
from esg_jax.weights import save_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pictures):
    """Three images and a broken one, with label maps in another folder."""
    root = tmp_path_factory.mktemp("ground")
    (root / "images").mkdir()
    (root / "masks").mkdir()
    for number, (image, masks) in enumerate(zip(*pictures, strict=True)):
        Image.fromarray(image).save(root / "images" / f"{number}.png")
        ids = np.array([0, *masks.ids])[masks.label_map]
        Image.fromarray(ids.astype(np.uint8)).save(root / "masks" / f"{number}.png")
    return root


@pytest.fixture
def esg(monkeypatch, grounder, folder, tmp_path, capsys):
    """`esg(*arguments)` -> exit status, stdout, stderr; the model is loaded already."""
    monkeypatch.setattr(ground, "open_grounder", lambda args: grounder)

    def run(*arguments, image="images", masks="masks"):
        argv = ["ground", str(folder / image), "--out", str(tmp_path), *arguments]
        status = main(argv + (["--masks", str(folder / masks)] if masks else []))
        return status, *capsys.readouterr()

    return run


@pytest.mark.slow
def test_a_folder(esg, folder, tmp_path, pictures):
    (folder / "images" / "9.png").write_text("broken")
    (folder / "masks" / "9.png").write_text("")
    try:
        status, out, err = esg("--text", "a red dog sees two cats", "--phrases", "dog", "two cats")
    finally:
        (folder / "images" / "9.png").unlink()
    assert status == 1 and "3 images in" in out and "'dog'" in out
    assert "9.png" in err and "1 of 4 images failed" in err
    records = json.loads((tmp_path / "grounding.json").read_text())
    assert [record["image"] for record in records] == ["0.png", "1.png", "2.png"]
    for record, masks in zip(records, pictures[1], strict=True):
        assert [phrase["text"] for phrase in record["phrases"]] == ["dog", "two cats"]
        assert [entity["id"] for entity in record["entities"]] == [2, 5, 9]
        for row, entity in enumerate(record["entities"]):
            np.testing.assert_array_equal(coco_mask.decode(entity["segmentation"]), masks.union([row]))
        for phrase in record["phrases"]:
            rows = [masks.ids.index(mask_id) for mask_id in phrase["mask_ids"]]
            np.testing.assert_array_equal(coco_mask.decode(phrase["segmentation"]).astype(bool), masks.union(rows))
    picture = np.asarray(Image.open(tmp_path / "0_grounding.png"))
    assert picture.ndim == 3 and picture.shape[1] >= 60


@pytest.mark.slow
def test_categories(esg, tmp_path):
    status, out, _ = esg("--categories", "dog,sky", "--stuff", "sky", "--rule", "threshold=0.3", "--no-pictures")
    assert status == 0 and not list(tmp_path.glob("*.png"))
    record = json.loads((tmp_path / "grounding.json").read_text())[0]
    assert record["task"] == "panoptic" and {segment["category"] for segment in record["segments"]} <= {"dog", "sky"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("masks", "text", "message"),
    [
        (np.zeros((40, 60), np.uint8), "a dog", "there are no masks to ground text in"),
        (np.ones((60, 40), np.uint8), "a dog", "is 60x40 pixels, its image is 40x60 (height x width)"),
        (np.ones((40, 60), np.uint8), "dog " * 200, "tokens with its picture, more than the 128 allowed; shorten it"),
    ],
    ids=["no masks", "another size", "long text"],
)
def test_what_one_image_cannot_be_asked(esg, folder, masks, text, message):
    """One line that says what is wrong, and exit status 1."""
    Image.fromarray(masks).save(folder / "odd.png")
    status, _, err = esg("--text", text, "--phrases", "dog", image="images/0.png", masks="odd.png")
    assert status == 1 and message in err and "Traceback" not in err
    assert len(err.strip().splitlines()) == 2 and "1 of 1 images failed" in err


@pytest.mark.slow
def test_more_masks_than_queries(esg, folder, tmp_path, grounder):
    """The largest are kept; the file says which were not."""
    labels = np.kron(np.arange(1, 25).reshape(4, 6), np.ones((10, 10))).astype(np.uint8)
    labels[:, :10] = 1
    Image.fromarray(labels).save(folder / "many.png")
    status, *_ = esg("--text", "a dog", "--phrases", "dog", image="images/0.png", masks="many.png")
    (record,) = json.loads((tmp_path / "grounding.json").read_text())
    kept = [entity for entity in record["entities"] if not entity.get("dropped")]
    assert status == 0 and len(kept) == grounder.max_entities == 8 and kept[0]["id"] == 1
    assert len(record["entities"]) == len(np.unique(labels))


@pytest.mark.slow
def test_a_word_that_is_not_in_the_image(esg, monkeypatch, grounder, tmp_path):
    """Nothing scores high enough: "not found" instead of a random mask, in every way of asking."""
    sober = copy.copy(grounder)
    sober.config = dataclasses.replace(sober.config, threshold=1.0, min_score=1.0, empty_score=1.0)
    monkeypatch.setattr(ground, "open_grounder", lambda args: sober)
    for arguments in (("--text", "a zebra", "--phrases", "zebra"), ("--refer", "zebra"), ("--question", "a zebra?")):
        status, out, _ = esg(*arguments, "--no-pictures")
        assert status == 0 and out.count("not found (best ") == 3
        for record in json.loads((tmp_path / "grounding.json").read_text()):
            (phrase,) = record["phrases"]
            assert not phrase["found"] and phrase["mask_ids"] == [] and phrase["best_score"] <= 1
            assert not coco_mask.decode(phrase["segmentation"]).any()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("--text", " "), {}, "--text is empty"),
        (("--refer", ""), {}, "--refer is empty"),
        (("--question", " "), {}, "--question is empty"),
        (("--refer", "x", "--phrases", "y"), {}, "--phrases goes with --text"),
        (("--categories", ","), {}, "--categories is empty"),
        (("--categories", "a", "--stuff", "b"), {}, "--stuff names 'b', which --categories lacks"),
        (("--categories", "none.txt"), {}, "--categories: no file none.txt"),
        (("--caption",), {"masks": "nowhere"}, "--masks: no such file or folder"),
        (("--caption",), {"masks": "masks/0.png"}, "is one file for 3 images"),
        (("--caption",), {"masks": "images/.."}, "has no 0.png, .json, .npz, .npy or folder 0"),
        (("--caption",), {"image": "none.png"}, "image file or folder not found"),
    ],
)
def test_wrong_use(monkeypatch, folder, tmp_path, capsys, arguments, options, message):
    monkeypatch.setattr(ground, "open_grounder", lambda args: pytest.fail("nothing slow before the checks"))
    argv = ["ground", str(folder / options.get("image", "images")), "--out", str(tmp_path), *arguments]
    assert main([*argv, "--masks", str(folder / options.get("masks", "masks"))]) == 2
    assert message in capsys.readouterr().err


def test_model_errors(folder, tmp_path, capsys, tiny_checkpoint):
    argv = ["ground", str(folder / "images"), "--out", str(tmp_path), "--caption", "--masks", str(folder / "masks")]
    for extra, message in (
        (["--model", str(tmp_path / "none.safetensors")], "no checkpoint at"),
        (["--model", str(tiny_checkpoint)], "does not say which tokenizer it needs; give --tokenizer"),
        (["--model", str(tiny_checkpoint), "--rule", "thresold=1"], "thresold"),
        (["--model", str(tiny_checkpoint), "--rule", "threshold"], "expected NAME=VALUE"),
    ):
        assert main([*argv, *extra]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_file_says_what_it_needs(tmp_path, tiny_gella, capsys):
    """Tokenizer, conversation style and rules are found in the weights; arguments override them."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *(f"w{k}" for k in range(57))])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    known = {"tokenizer": str(tmp_path / "tokenizer.json"), "conversation": "chatml", "rules": {"threshold": 0.4}}
    save_weights(tmp_path / "gella.safetensors", tiny_gella, {"grounding": known})
    argv = ["ground", "x.png", "--out", "y", "--caption", "--model", str(tmp_path / "gella.safetensors")]
    grounder = ground.open_grounder(make_parser("ground").parse_args([*argv, "--rule", "min_score=0.2"]))
    assert (grounder.config.threshold, grounder.config.min_score) == (0.4, 0.2)
    assert grounder.tokenizer.seg_id == 62 and grounder.prompts.system.startswith("You look at pictures")


@pytest.mark.slow
def test_official_formats(grounder, pictures, tmp_path):
    """Files for `esg evaluate`: a perfect answer scores 1."""
    scenes = grounder.look(*pictures)
    result = grounder.ground(scenes[:1], ["a dog and cats"], [["dog", "cats"]], [[False, True]])[0]
    truth = [{"gt": scenes[0].rle(phrase.entities), "plural": False, "isthing": True} for phrase in result.phrases]
    record = grounding_files.phrase_record("7_1", result, truth)
    (tmp_path / "png.json").write_text(json.dumps([record]))
    assert phrase_grounding(tmp_path / "png.json", tmp_path / "png.json").result()["AR"] == pytest.approx(1, abs=1e-4)
    results = grounder.refer(scenes[:1] * 2, ["dog", "cat"])
    truth = [{"gt": scenes[0].rle(r.phrases[0].entities)} for r in results]
    (tmp_path / "res.json").write_text(json.dumps([grounding_files.referring_record(7, results, truth)]))
    scores = referring_segmentation(tmp_path / "res.json", tmp_path / "res.json").result()
    assert max(value for value in scores.values() if isinstance(value, float)) == pytest.approx(1)
    with pytest.raises(ValueError, match="2 predictions for 1 annotated ones"):
        grounding_files.phrase_record("7_1", result, truth[:1])
    panoptic = grounder.panoptic(scenes[:1], ["dog", "sky"], [True, False])[0]
    entry = grounding_files.panoptic_record(tmp_path, 7, "seven", panoptic, [18, 187])
    ids = np.asarray(Image.open(tmp_path / "seven.png")).astype(int) @ [1, 256, 65536]
    assert set(np.unique(ids)) - {0} == {segment["id"] for segment in entry["segments_info"]}
    instances = grounder.instances(scenes[:1], ["dog", "sky"])[0]
    records = grounding_files.instance_records(7, instances, [18, 187])
    assert records and all(record["category_id"] in (18, 187) for record in records)
    assert grounding_files.text_record(result) == ["dog", "cats"]


@pytest.mark.slow
@pytest.mark.usefixtures("smollm2_path")
def test_the_packaged_weights(tmp_path):
    """Packaged language model, GELLA and masks from a file: nouns of a caption in a photograph."""
    data = pytest.importorskip("skimage.data")
    photo = data.astronaut()
    y, x = np.mgrid[: photo.shape[0], : photo.shape[1]]
    labels = np.full(photo.shape[:2], 3, np.uint8)
    labels[((y - 150) / 160) ** 2 + ((x - 225) / 75) ** 2 < 1] = 1
    labels[(y > 200) & (np.abs(x - 230) < (y - 120) * 0.75) & (x > 60)] = 1
    labels[(x < 80) & (y < 380)] = 2
    Image.fromarray(photo).save(tmp_path / "photo.png")
    Image.fromarray(labels).save(tmp_path / "masks.png")
    arguments = ["ground", str(tmp_path / "photo.png"), "--masks", str(tmp_path / "masks.png"), "--out"]
    assert main([*arguments, str(tmp_path / "found"), "--text", "A woman is smiling."]) == 0
    (record,) = json.loads((tmp_path / "found" / "grounding.json").read_text())
    (phrase,) = record["phrases"]
    assert phrase["text"] == "woman" and phrase["mask_ids"][0] == 1 and phrase["best_score"] > 0.5
    assert (tmp_path / "found" / "photo_grounding.png").stat().st_size > 10_000
