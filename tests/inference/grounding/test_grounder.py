"""Grounding with a tiny random GELLA: what goes in comes out in the right place, whatever the batch."""

import copy
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esg_jax.inference.grounding.decisions import GroundingConfig, entity_scores
from esg_jax.inference.grounding.grounder import Grounder
from esg_jax.inference.grounding.reconstruction import Reconstructor
from esg_jax.inference.grounding.scene_encoder import mask_overlaps
from esg_jax.masks import disjoint_masks, read_masks
from esg_jax.models.gella import Gella
from esg_jax.models.gella.entity_variants import EntityBlocksConfig, RoiAlignConfig
from esg_jax.ops.padding import content_mask
from esg_jax.text.sequences import SequenceBuilder, Turn

pytestmark = pytest.mark.slow
TEXT = "a red dog sees two cats near the dog"


@pytest.fixture(scope="module")
def scenes(grounder, pictures):
    return grounder.look(*pictures)


def with_rules(grounder, **rules):
    """The same compiled programs with other rules."""
    other = copy.copy(grounder)
    other.config = dataclasses.replace(other.config, **rules)
    return other


def test_scenes(scenes, grounder):
    assert [scene.masks.ids for scene in scenes] == [(2, 5, 9)] * 3
    for scene in scenes:
        assert len(set(scene.query[0].tolist())) == 3 and scene.groundable.all()
        assert scene.embed.shape == (2, grounder.max_entities, 32) and scene.entityness.shape == (3,)


def test_scores_are_the_models(tiny_gella, short_prompts, word_tokenizer, grounder, scenes):
    """The forced pass against the model called by hand, without padding."""
    builder = SequenceBuilder(word_tokenizer, short_prompts, tiny_gella.config.grid**2)
    sequence = builder.build([Turn(f"Nouns: {TEXT}", short_prompts.list_answer(["red dog", "two cats"]))])

    @jax.jit
    def by_hand(model, vision, embed, ids, positions):
        return model.associate(model.noun_states(model.text(vision, ids), positions), embed)

    colorings = []
    for embed, query in zip(scenes[0].embed, scenes[0].query, strict=True):
        arrays = (scenes[0].vision, embed, sequence.ids, sequence.seg_pos)
        logits = by_hand(tiny_gella, *(jnp.asarray(array)[None] for array in arrays))
        colorings.append(entity_scores(np.asarray(logits)[0], query))
    expected = np.mean(colorings, axis=0)
    result = grounder.ground(scenes[:1], [TEXT], [["red dog", "two cats"]])[0]
    assert [phrase.text for phrase in result.phrases] == ["red dog", "two cats"]
    assert [phrase.span for phrase in result.phrases] == [(2, 9), (15, 23)]
    np.testing.assert_allclose([phrase.best_score for phrase in result.phrases], expected.max(1), atol=1e-5)
    first = result.phrases[0]
    np.testing.assert_allclose(first.scores, expected[0][list(first.entities)], atol=1e-5)
    np.testing.assert_array_equal(result.mask(first), scenes[0].masks.union(first.entities))


def test_results_do_not_depend_on_the_batch(grounder, pictures, scenes):
    images, masks = pictures
    together = grounder.ground(scenes, [TEXT] * 3, [["red dog", "cats", "the dog"]] * 3)
    for index, wanted in enumerate(together):
        (scene,) = grounder.look(images[index : index + 1], masks[index : index + 1])
        alone = grounder.ground([scene], [TEXT], [["red dog", "cats", "the dog"]])[0]
        for ours, theirs in zip(alone.phrases, wanted.phrases, strict=True):
            assert ours.entities == theirs.entities
            np.testing.assert_allclose(ours.best_score, theirs.best_score, atol=1e-5)


def test_generated_answers(grounder, scenes):
    (result,) = grounder.ground(scenes[:1], [TEXT])  # random weights rarely say <SEG>, but every step runs
    assert result.task == "text" and result.text == TEXT
    assert all(phrase.best_score <= 1 for phrase in result.phrases)
    caption = grounder.describe(scenes[:2])
    assert len(caption) == 2 and grounder.describe(scenes[1:2]) == caption[1:]


def test_expressions_and_questions(grounder, scenes):
    sure, unsure = with_rules(grounder, min_score=0.0), with_rules(grounder, min_score=1.0, empty_score=1.0)
    (found,) = sure.refer(scenes[:1], ["the red dog "])
    assert found.text == "the red dog" and len(found.phrases) == 1 and len(found.phrases[0].entities) == 1
    (lost,) = unsure.refer(scenes[:1], ["the red dog"])
    assert not lost.phrases[0].found and not lost.mask(lost.phrases[0]).any()
    (answer,) = unsure.reason(scenes[:1], ["Who barks?"])
    assert answer.prompt == "Who barks?" and not answer.phrases[0].found and answer.phrases[0].best_score > 0


def test_categories(grounder, scenes):
    whole = with_rules(grounder, panoptic_score=0.0)
    names = ["cat", "floor-other-merged", "dog", "sky", "rug"]
    (result,) = whole.panoptic(scenes[:1], names, [True, False, True, False, True])
    assert sorted(entity for segment in result.segments for entity in segment.entities) == [0, 1, 2]
    scored = whole.instances(scenes[:1], names)[0].segments
    assert len(scored) == 9 and list(scored) == sorted(scored, key=lambda segment: -segment.score)
    # In parts: every part is its own sentence, so its scores are those of its names alone.
    parts = with_rules(grounder, class_names_per_prompt=3).category_scores(scenes[:1], names)[0]
    alone = whole.category_scores(scenes[:1], names[:3])[0]
    np.testing.assert_allclose(parts[:3], alone, atol=1e-5)
    assert parts.shape == (5, 3)


def test_reconstructed_masks(reconstructing_grounder, pictures):
    (scene,) = reconstructing_grounder.look(pictures[0][:1], pictures[1][:1])
    assert scene.probabilities.shape == (3, 16, 16)
    assert scene.mask((0,)).shape == (40, 60)
    wide = dataclasses.replace(scene, probabilities=np.pad(np.ones((3, 8, 16), np.float32), ((0, 0), (0, 8), (0, 0))))
    assert wide.mask((0,))[:24].all()  # the lower half of the square is partly padding
    rows = np.pad(np.ones((3, 10, 16), np.float32), ((0, 0), (3, 3), (0, 0)))  # content in the middle
    centred = dataclasses.replace(scene, probabilities=rows, content=(10 / 16, 1.0), start=(3 / 16, 0.0))
    assert centred.mask((0,)).all() and not dataclasses.replace(centred, start=(0.0, 0.0)).mask((0,)).all()


def test_centred_pictures(reconstructing_grounder, pictures):
    """The geometry around a network that gives back what is painted."""
    other = copy.copy(reconstructing_grounder)
    encoder = other.encode_scenes = copy.copy(other.encode_scenes)
    encoder._model = dataclasses.replace(encoder._model, pad_position="center")

    def see(image, size, label_map, map_size):
        logits = (label_map[:, None, 2::4, 2::4] == np.arange(1, 9)[:, None, None]) - 0.5
        inside = content_mask(64, 64, map_size, "center")
        iou = jnp.stack([mask_overlaps(logits, label_map, inside, 8)] * 2, axis=1)
        seen = {"iou": iou, "entityness": np.ones((2, 2, 8)), "embed": np.zeros((2, 2, 8, 32))}
        return seen | {"vision": np.zeros((2, 2, 2, 64)), "probabilities": 0.5 + np.clip(logits, -0.5, 0.5)}

    encoder._see = see
    for scene, image in zip(other.look(*pictures), pictures[0], strict=True):
        assert (scene.query[0] == [0, 1, 2]).all()
        np.testing.assert_allclose(scene.start, (1 - np.array(scene.content)) / 2, atol=1 / 64)
        for entity in range(3):
            truth, mask = scene.masks.union((entity,)), scene.mask((entity,))
            assert mask.shape == image.shape[:2] and (mask & truth).sum() / (mask | truth).sum() > 0.7


def test_entities_without_reconstruction(random_model, tiny_gella_config, short_prompts, word_tokenizer, pictures):
    """Entity k has embedding k: nothing is matched, and all rules stay the same."""
    entities = RoiAlignConfig(8, EntityBlocksConfig(dim=32, num_heads=4, ffn_dim=48, num_blocks=0), bins=2)
    model = random_model(dataclasses.replace(tiny_gella_config, entities=entities), Gella)
    grounder = Grounder(model, word_tokenizer, short_prompts, GroundingConfig(min_score=0.0), batch_size=2)
    images, masks = pictures
    (scene,) = grounder.look(images[:1], masks[:1])
    assert scene.query.tolist() == [[0, 1, 2]] and scene.entityness.tolist() == [1, 1, 1]
    (result,) = grounder.refer([scene], ["the red dog"])
    assert len(result.phrases[0].entities) == 1 and result.mask(result.phrases[0]).any()
    thin = np.zeros((2, 2000), np.int32)
    thin[0, 999], thin[1] = 4, 7  # one pixel, gone at the size of the label map
    (scene,) = grounder.look([np.zeros((2, 2000, 3), np.uint8)], [disjoint_masks(read_masks(thin, (2, 2000)))])
    assert scene.groundable.tolist() == [False, True]
    with pytest.raises(ValueError, match="RoiAlignConfig reconstructs no masks"):
        Grounder(model, word_tokenizer, short_prompts, GroundingConfig(output_masks="reconstructed"))
    with pytest.raises(ValueError, match="RoiAlignConfig reconstructs no masks"):
        Reconstructor(model)


def test_nouns_of_the_first_blocks(random_model, tiny_gella_config, short_prompts, word_tokenizer, pictures):
    entities = RoiAlignConfig(8, EntityBlocksConfig(dim=32, num_heads=4, ffn_dim=48, num_blocks=0), bins=2)
    config = dataclasses.replace(tiny_gella_config, entities=entities, noun_blocks=1, seg_hidden="predict")
    model = random_model(config, Gella)
    with pytest.raises(ValueError, match="reads nouns early .noun_blocks. and writes no <SEG>"):
        Grounder(model, word_tokenizer, short_prompts)
    grounder = Grounder(model, word_tokenizer, short_prompts, nouns="rule")
    images, masks = pictures
    (scene,) = grounder.look(images[:1], masks[:1])
    (result,) = grounder.ground([scene], ["a red dog sees two cats"])
    assert [phrase.text for phrase in result.phrases] == ["red dog", "two cats"]
    with pytest.raises(ValueError, match="answers in no words"):
        grounder.reason([scene], ["what barks?"], forced=False)
    builder = SequenceBuilder(word_tokenizer, short_prompts, config.num_image_tokens)
    sequence = builder.build(
        [Turn("Nouns: a red dog sees two cats", short_prompts.list_answer(["red dog", "two cats"]))]
    )

    def by_hand(model, vision, embed, ids, positions, blocks):
        states, _ = model.llm(model.embed_text(vision, ids), num_blocks=blocks, lora=model.lora)
        return model.associate(jnp.take_along_axis(states, positions[..., None] - 1, axis=1), embed)

    arrays = (scene.vision, scene.embed[0], sequence.ids, sequence.seg_pos)
    arrays = tuple(jnp.asarray(array)[None] for array in arrays)
    best, late = (
        jax.nn.sigmoid(jax.jit(by_hand, static_argnums=5)(model, *arrays, blocks))[0, :, :3].max(axis=1)
        for blocks in (1, None)
    )
    assert np.abs(best - late).max() > 1e-3, "so that the comparison can fail"
    np.testing.assert_allclose([phrase.best_score for phrase in result.phrases], best, atol=1e-5)


def test_bad_input(grounder, scenes, pictures, tiny_gella, short_prompts, word_tokenizer):
    images, masks = pictures
    for call, message in (
        (lambda: grounder.ground(scenes[:1], [" "]), "the text is empty"),
        (lambda: grounder.ground(scenes[:1], ["dog " * 200], [["dog"]]), "more than the 128 allowed"),
        (lambda: grounder.ground(scenes[:1], ["dog " * 200]), "more than the"),
        (lambda: grounder.ground(scenes[:1], [TEXT], [["dog", " "]]), "text 1 has an empty phrase"),
        (lambda: grounder.ground(scenes[:1], [TEXT], []), "0 lists of phrases for 1 texts"),
        (lambda: grounder.refer(scenes[:1], [""]), "the text is empty"),
        (lambda: grounder.panoptic(scenes[:1], ["a", "b"], [True]), "1 is_thing for 2 names"),
        (lambda: grounder.look(images[:1], masks[1:2]), "image 1 is (40, 60), its masks are (60, 40)"),
        (lambda: grounder.look([images[0].astype(np.float32)], masks[:1]), "image 1: expected an RGB uint8 array"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
    labels = np.arange(64).reshape(8, 8)
    many = disjoint_masks(read_masks(labels, (8, 8)))
    with pytest.raises(ValueError, match="image 1 has 63 masks; the model takes 1 to 8"):
        grounder.look([np.zeros((8, 8, 3), np.uint8)], [many])
    other = copy.copy(word_tokenizer)
    other.seg_id = 59
    with pytest.raises(ValueError, match="the model's seg_id is 62, the tokenizer's 59"):
        Grounder(tiny_gella, other, short_prompts)
