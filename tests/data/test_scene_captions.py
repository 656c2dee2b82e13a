import dataclasses
import json

import numpy as np
import pytest

pytest.importorskip("skimage", reason="the photographs come from scikit-image (extra: demo)")

from data.scenes import SceneConfig, scene_layout
from data.scenes.captions import COLOURS, Thing, colour_names, describe, make_caption, phrases_for, write_captions
from data.scenes.dataset import write_scenes
from esg_jax.input.grounding_readers import GroundingSourceConfig, open_narratives

SMALL = SceneConfig(long_side=(240, 300))


def things(*specs):
    return [Thing(kind, colour, place, size, 0.02) for kind, colour, place, size in specs]


def test_phrases_fit_their_entities_and_no_others():
    scene = things(
        ("cuboid", "red", "on the left", ""), ("cuboid", "red", "on the right", ""),
        ("cuboid", "blue", "at the top", ""),
        ("ring", "", "on the left", "small"), ("ring", "red", "on the right", ""), ("text", "red", "at the top", ""),
    )  # fmt: skip
    assert phrases_for(scene, 0) == [
        ("three boxes", (0, 1, 2)), ("two red boxes", (0, 1)), ("box on the left", (0,)), ("red box on the left", (0,)),
    ]  # fmt: skip
    # The colour of the other ring is not known: it might be red as well.
    assert phrases_for(scene, 4) == [
        ("two rings", (3, 4)),
        ("ring on the right", (4,)),
        ("red ring on the right", (4,)),
    ]
    assert phrases_for(scene, 5)[0] == ("letters", (5,))
    # What is too small to be mentioned also spoils phrases that would count it.
    tiny = dataclasses.replace(scene[1], area=1e-5)
    assert phrases_for([scene[0], tiny], 0)[0] == ("box on the left", (0,))


def test_colour_names():
    pixels = np.array([[(200, 20, 20), (30, 60, 200), (120, 80, 50), (250, 250, 250), (20, 20, 20), (40, 150, 60)]])
    names = [COLOURS[k] for k in colour_names(pixels.astype(np.uint8))[0]]
    assert names == ["red", "blue", "brown", "white", "black", "green"]


def test_descriptions_follow_the_layout():
    _, layout = scene_layout(7, SMALL)
    red = np.full((*layout.labels.shape, 3), (200, 20, 20), np.uint8)
    found = describe(red, layout)
    assert len(found) == len(layout.items) and {thing.colour for thing in found} == {"red"}
    for k, thing in enumerate(found):
        y, x = np.nonzero(layout.labels == k + 1)
        assert thing.area == len(y) / layout.labels.size
        third = (3 * x.mean() / layout.labels.shape[1], 3 * y.mean() / layout.labels.shape[0])
        assert ("left" in thing.place) == (third[0] < 1) and ("right" in thing.place) == (third[0] >= 2)
        assert ("top" in thing.place) == (third[1] < 1) and ("bottom" in thing.place) == (third[1] >= 2)
    caption, phrases = make_caption(np.random.default_rng(0), found)
    mentioned = [k for phrase in phrases for k in phrase["entities"]]
    assert phrases and len(mentioned) == len(set(mentioned))
    assert all(caption[phrase["start"] : phrase["end"]] == phrase["text"] for phrase in phrases)


def test_captions_of_a_data_set(tmp_path):
    annotations = write_scenes(tmp_path, 2, 11, SMALL)
    captions = write_captions(tmp_path)
    first = captions.read_text()
    assert write_captions(tmp_path).read_text() == first
    source = open_narratives(GroundingSourceConfig(captions=str(captions), annotations=str(annotations)))
    assert len(source) == 8 and source.num_linked.min() > 0
    content = json.loads(annotations.read_text())
    content["annotations"][0]["area"] += 1
    annotations.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="comes out differently now"):
        write_captions(tmp_path)
    with pytest.raises(FileNotFoundError, match="no scenes in"):
        write_captions(tmp_path / "none")
