"""Grounding with GELLA: one function per task, on any entity masks (ESG, section 4.2).

`Grounder.look` turns images and masks into scenes once; the tasks then ask about them. Where the phrases are known
(evaluation, category names, expressions), the answer is written down with them and read once ("forced"); otherwise
the model writes it ("generated").
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from esg_jax.inference.grounding import decisions
from esg_jax.inference.grounding.decisions import GroundingConfig
from esg_jax.inference.grounding.decoding import DecodingConfig, generate
from esg_jax.inference.grounding.results import CategoryResult, GroundedPhrase, GroundingResult, Scene
from esg_jax.inference.masks_in import EntityMasks
from esg_jax.input.square import square_image, square_labels
from esg_jax.models.gella import Gella
from esg_jax.ops.padding import content_mask, content_start
from esg_jax.text.nouns import noun_phrases
from esg_jax.text.prompts import Prompts
from esg_jax.text.sequences import (
    SequenceBuilder,
    Tokenizer,
    TokenSequence,
    Turn,
    bucket_length,
    locate,
    pad_sequences,
)

_LENGTHS = (128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
_PHRASES = (8, 64, 160, 512)


class Grounder:
    """Grounds text in the entities of images.

    Programs are compiled per bucket of text length and of number of phrases, always for `batch_size` images; a result
    does not depend on what else is in its batch.

    Args:
        model: GELLA with a language model.
        tokenizer: of that language model.
        prompts: the wording it was trained with.
        config: thresholds and modes.
        batch_size: images per call of the network.
        max_new_tokens: longest generated answer.
        nouns: who finds the noun phrases of a text when they are not given: "model", or "rule" for language models
            that have not learned to (`esg_jax.text.nouns`).
        with_count: answers begin with the number of phrases, as in training (`data.with_count`).
        seed: of the colours.

    Raises:
        ValueError: a model without language, one whose special tokens are not the tokenizer's, or reconstructed masks
            of one that has none.
    """

    def __init__(
        self,
        model: Gella,
        tokenizer: Tokenizer,
        prompts: Prompts | None = None,
        config: GroundingConfig | None = None,
        *,
        batch_size: int = 1,
        max_new_tokens: int = 256,
        nouns: str = "model",
        with_count: bool = True,
        seed: int = 0,
    ):
        if model.config.llm is None:
            raise ValueError("this model has no language branch (llm is None); it can only reconstruct masks")
        if config is not None and config.output_masks == "reconstructed" and not model.config.reconstructs:
            raise ValueError(f"{type(model.config.entities).__name__} reconstructs no masks; set output_masks to input")
        if nouns not in ("model", "rule"):
            raise ValueError(f"nouns is {nouns!r}; choose model or rule")
        if nouns == "model" and model.config.noun_blocks is not None:
            raise ValueError("this model reads nouns early (noun_blocks) and writes no <SEG>; set nouns to rule")
        for name in ("image_id", "seg_id"):
            if getattr(model.config, name) != getattr(tokenizer, name):
                raise ValueError(
                    f"the model's {name} is {getattr(model.config, name)}, the tokenizer's "
                    f"{getattr(tokenizer, name)}; load the tokenizer that the model was trained with"
                )
        self.model_config = model.config
        self.tokenizer = tokenizer
        self.prompts = prompts or Prompts.load()
        self.config = config or GroundingConfig()
        self.batch_size = batch_size
        self._with_count, self._by_rule = with_count, nouns == "rule"
        self._builder = SequenceBuilder(tokenizer, self.prompts, model.config.num_image_tokens)
        limit = model.config.llm.max_length
        self._lengths = sorted({length for length in _LENGTHS if length < limit} | {limit})
        self._keys = jax.random.split(jax.random.key(seed), self.config.colorings)
        self._graph, self._state = nnx.split(model)
        self._see = jax.jit(self._run_vision)
        self._read = jax.jit(self._run_text)
        self._write = jax.jit(self._run_generation, static_argnames="config")
        specials = {tokenizer.image_id, tokenizer.pad_id, tokenizer.bos_id} - {tokenizer.eos_id}
        self._decoding = DecodingConfig(
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            max_new_tokens=min(max_new_tokens, limit - 1),
            seg_id=tokenizer.seg_id,
            seg_hidden=model.config.seg_hidden,
            suppress=tuple(sorted(specials)),
            vocab_size=tokenizer.vocab_size,
        )

    @property
    def max_entities(self) -> int:
        """Masks per image that the model can tell apart."""
        return self.model_config.num_queries

    # Scenes.

    def look(self, images: Sequence[np.ndarray], masks: Sequence[EntityMasks]) -> list[Scene]:
        """Encodes images with their masks.

        Args:
            images: RGB uint8 (h, w, 3) each.
            masks: of the same sizes, from `disjoint_masks`.

        Raises:
            ValueError: sizes differ, no masks, or more than `max_entities`.
        """
        for number, (image, entities) in enumerate(zip(images, masks, strict=True), start=1):
            if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
                raise ValueError(f"image {number} is {image.dtype} {image.shape}; expected RGB uint8 (h, w, 3)")
            if entities.size != image.shape[:2]:
                raise ValueError(f"image {number} is {image.shape[:2]}, its masks are {entities.size} (height, width)")
            if not 0 < len(entities) <= self.max_entities:
                raise ValueError(
                    f"image {number} has {len(entities)} masks; the model takes 1 to {self.max_entities} "
                    "(`disjoint_masks(max_entities=...)` keeps the largest)"
                )
        out = []
        for batch in _batches(list(zip(images, masks, strict=True)), self.batch_size):
            out += self._look_batch(*zip(*batch, strict=True))
        return out

    def _look_batch(self, images, masks) -> list[Scene]:
        side, pad = self.model_config.colormap.size, self.model_config.pad_position
        pixels, sizes = zip(*(square_image(image, self.model_config.image_size, pad) for image in images), strict=True)
        maps, map_sizes = zip(*(square_labels(m.label_map.astype(np.int16), side, pad) for m in masks), strict=True)
        arrays = (np.stack(part) for part in (pixels, sizes, maps, map_sizes))
        seen = jax.device_get(self._see(self._state, *(_fill(array, self.batch_size) for array in arrays)))
        out = []
        for row, entities in enumerate(masks):
            count = len(entities)
            query = np.stack(
                [decisions.match_queries(iou[:, :count], self.config.match_iou) for iou in seen["iou"][:, row]]
            )
            entityness = np.where(query >= 0, np.take_along_axis(seen["entityness"][:, row], query.clip(0), 1), 0)
            probabilities = None
            if self.config.output_masks == "reconstructed":
                found = (query[0] >= 0)[:, None, None]
                probabilities = np.where(found, seen["probabilities"][row][query[0].clip(0)], 0)
            content = tuple(float(length) / side for length in map_sizes[row])
            start = tuple(float(content_start(length, side, pad)) / side for length in map_sizes[row])
            vision, embed = seen["vision"][row], seen["embed"][:, row]
            out.append(Scene(entities, vision, embed, query, entityness.mean(0), probabilities, content, start))
        return out

    def _run_vision(self, state, image_bhwc, size_b2, label_map_bhw, map_size_b2) -> dict[str, jax.Array]:
        model = nnx.merge(self._graph, state)
        vision = model.vision_tokens(image_bhwc, size_b2)
        inside = content_mask(*label_map_bhw.shape[1:], map_size_b2, self.model_config.pad_position)

        def with_colors(key):
            keys = jnp.broadcast_to(key, len(image_bhwc))
            output = model.entities(vision, label_map_bhw, keys, size_b2=map_size_b2)
            if output.masks is None:  # entity k has embedding k
                present = output.present.astype(jnp.float32)
                iou = jnp.eye(self.max_entities) * present[:, None]
                return {"embed": output.embed, "entityness": present, "iou": iou}, None
            logits = output.masks.image_mask_logits()[:, 0]
            seen = {
                "embed": output.embed,
                "entityness": jax.nn.softmax(output.masks.image.logits[-1])[..., 0],
                "iou": _overlaps(logits, label_map_bhw, inside, self.max_entities),
            }
            return seen, logits

        seen, logits = jax.lax.map(with_colors, self._keys)
        if self.config.output_masks == "reconstructed":
            seen["probabilities"] = jax.nn.sigmoid(logits[0])
        return {**seen, "vision": vision}

    # Tasks.

    def describe(self, scenes: Sequence[Scene], question: str | None = None) -> list[str]:
        """Writes a caption of every image."""
        turn = Turn(question or self.prompts.description[0])
        written = self._generate(scenes, [self._builder.build([turn])] * len(scenes), nouns=False)
        return [self._builder.text(ids) for ids, _, _ in written]

    def extract(self, scenes: Sequence[Scene], texts: Sequence[str]) -> list[list[str]]:
        """The noun phrases of texts, listed by the model (or found by rule)."""
        if self._by_rule:
            return [noun_phrases(text) for text in texts]
        prompts = [self._builder.build([self._extraction(text)]) for text in texts]
        return [self._builder.phrases(ids) for ids, _, _ in self._generate(scenes, prompts)]

    def ground(
        self,
        scenes: Sequence[Scene],
        texts: Sequence[str | None],
        phrases: Sequence[Sequence[str]] | None = None,
        plural: Sequence[Sequence[bool]] | None = None,
    ) -> list[GroundingResult]:
        """Finds the entities that the nouns of a text mean.

        Args:
            scenes: from `look`.
            texts: one per scene; None lets the model write a caption first and grounds that.
            phrases: the noun phrases of each text, in order (forced); None lets the model list them (generated), or
                the rule.
            plural: which phrases are plural, where this is known: then every phrase gets entities, as the evaluation
                of panoptic narrative grounding asks; otherwise uncertain phrases are "not found".

        Raises:
            ValueError: an empty text, one longer than the model's context, or phrases that do not fit the texts.
        """
        captions = iter(self.describe([scene for scene, t in zip(scenes, texts, strict=True) if t is None]))
        turns: list[list[Turn]] = []
        shown: list[str] = []
        for text in texts:
            shown.append(next(captions) if text is None else _some_text(text))
            # The model grounds its own caption in a second turn of the conversation in which it wrote it.
            first = [Turn(self.prompts.description[0], shown[-1])] if text is None else []
            turns.append([*first, self._extraction(shown[-1])] if shown[-1] else [])
        if phrases is None and self._by_rule:
            phrases = [noun_phrases(text) for text in shown]
        listed, scores, complete = self._nouns(scenes, turns, phrases)
        out = []
        for row, scene in enumerate(scenes):
            chosen = []
            for noun, values in enumerate(scores[row]):
                if plural is not None:
                    chosen.append(decisions.entities_of_phrase(values, plural[row][noun], self.config))
                else:
                    chosen.append(decisions.entities_of_noun(values, self.config))
            task = "caption" if texts[row] is None else "text"
            found = _phrases(shown[row], listed[row], chosen, scores[row])
            out.append(GroundingResult(task, shown[row], found, scene, complete=complete[row]))
        return out

    def refer(self, scenes: Sequence[Scene], expressions: Sequence[str]) -> list[GroundingResult]:
        """Finds the entity that a referring expression means; one phrase per result, "not found" when uncertain.

        Raises:
            ValueError: an empty expression.
        """
        expressions = [_some_text(expression) for expression in expressions]
        whole = self.config.refer_mode == "whole"
        turns = [[self._extraction(expression)] for expression in expressions]
        phrases = [[expression] for expression in expressions] if whole else None
        if not whole and self._by_rule:
            phrases = [noun_phrases(expression) for expression in expressions]
        _, scores, complete = self._nouns(scenes, turns, phrases)
        out = []
        for row, (scene, expression) in enumerate(zip(scenes, expressions, strict=True)):
            noun, chosen = decisions.entities_of_expression(scores[row], self.config)
            values = scores[row][noun or 0] if len(scores[row]) else np.zeros(len(scene.masks))
            found = _phrases(expression, [expression], [chosen], values[None])
            out.append(GroundingResult("refer", expression, found, scene, complete=complete[row]))
        return out

    def reason(
        self, scenes: Sequence[Scene], questions: Sequence[str], *, forced: bool = True
    ) -> list[GroundingResult]:
        """Finds what answers a question; forced with the answer "<SEG>", else the model answers in its own words.

        Raises:
            ValueError: an empty question, or a model with `noun_blocks` asked for its own words.
        """
        questions = [_some_text(question) for question in questions]
        if forced:
            answer = self.prompts.reasoning_answer()
            sequences = [self._builder.build([Turn(question, answer)]) for question in questions]
            answers = [("", values, True) for values in self._scores(scenes, sequences)]
        else:
            if self.model_config.noun_blocks is not None:
                raise ValueError("this model reads nouns early (noun_blocks) and answers in no words; leave forced on")
            written = self._generate(scenes, [self._builder.build([Turn(question)]) for question in questions])
            answers = [(self._builder.text(ids), values, done) for ids, values, done in written]
        out = []
        for scene, question, (text, values, done) in zip(scenes, questions, answers, strict=True):
            best = values.max(axis=0) if len(values) else np.zeros(len(scene.masks), np.float32)
            chosen = decisions.entities_of_question(best, self.config)
            found = _phrases(text, [text or question], [chosen], best[None])
            out.append(GroundingResult("question", text, found, scene, prompt=question, complete=done))
        return out

    def panoptic(
        self, scenes: Sequence[Scene], names: Sequence[str], is_thing: Sequence[bool] | None = None
    ) -> list[CategoryResult]:
        """Gives every entity the category whose name fits best; any names (closed or open vocabulary).

        Args:
            scenes: from `look`.
            names: categories; dataset spellings such as "floor-other-merged" are cleaned for the text.
            is_thing: which are countable (default: all); entities of the others are merged into one segment each.

        Raises:
            ValueError: no names, equal names, or another number of `is_thing`.
        """
        things = np.ones(len(names), bool) if is_thing is None else np.asarray(is_thing, bool)
        if len(things) != len(names):
            raise ValueError(f"{len(things)} is_thing for {len(names)} names")
        return [
            CategoryResult(
                tuple(names),
                tuple(things.tolist()),
                tuple(decisions.panoptic_segments(scores, scene.entityness, things, self.config)),
                scene,
                "panoptic",
            )
            for scene, scores in zip(scenes, self.category_scores(scenes, names), strict=True)
        ]

    def instances(self, scenes: Sequence[Scene], names: Sequence[str]) -> list[CategoryResult]:
        """Scored instances of named categories: every entity with its best few classes.

        Raises:
            ValueError: no names, or equal ones.
        """
        return [
            CategoryResult(
                tuple(names),
                (True,) * len(names),
                tuple(decisions.instances(scores, scene.entityness, self.config)),
                scene,
                "instances",
            )
            for scene, scores in zip(scenes, self.category_scores(scenes, names), strict=True)
        ]

    def category_scores(self, scenes: Sequence[Scene], names: Sequence[str]) -> list[np.ndarray]:
        """S of all categories (k, n) for every scene; long lists are asked in parts, averaged over orders."""
        cleaned = decisions.distinct_names(names)
        lists = decisions.category_lists(len(names), self.config)
        totals = [np.zeros((len(names), len(scene.masks)), np.float32) for scene in scenes]
        for chunk in (chunk for chunks in lists for chunk in chunks):
            asked = [cleaned[index] for index in chunk]
            turn = self._extraction(self.prompts.category_sentence(asked), asked)
            sequence = self._builder.build([turn])
            for total, scores in zip(totals, self._scores(scenes, [sequence] * len(scenes)), strict=True):
                total[chunk] += scores / len(lists)
        return totals

    # Text.

    def _extraction(self, text: str, phrases: Sequence[str] | None = None) -> Turn:
        answer = None if phrases is None else self._listed(phrases)
        return Turn(self.prompts.extraction_question(text), answer)

    def _listed(self, phrases: Sequence[str]):
        return self.prompts.list_answer(phrases, with_count=self._with_count)

    def _nouns(self, scenes, turns: list[list[Turn]], phrases) -> tuple[list[list[str]], list[np.ndarray], list[bool]]:
        """Noun phrases of conversations that end with the request for them, their scores, and which are complete.

        A scene with an empty conversation has no nouns.
        """
        asked = [row for row, conversation in enumerate(turns) if conversation]
        listed: list[list[str]] = [[] for _ in turns]
        scores = [np.zeros((0, len(scene.masks)), np.float32) for scene in scenes]
        complete = [True] * len(turns)
        if phrases is None:
            prompts = [self._builder.build(turns[row]) for row in asked]
            written = self._generate([scenes[row] for row in asked], prompts)
            for row, (ids, values, done) in zip(asked, written, strict=True):
                listed[row] = self._builder.phrases(ids)[: len(values)]
                scores[row], complete[row] = values, done
            return listed, scores, complete
        if len(phrases) != len(turns):
            raise ValueError(f"{len(phrases)} lists of phrases for {len(turns)} texts")
        asked = [row for row in asked if len(phrases[row])]
        sequences = []
        for row in asked:
            if not all(phrase.strip() for phrase in phrases[row]):
                raise ValueError(f"text {row + 1} has an empty phrase")
            *before, last = turns[row]
            listed[row] = list(phrases[row])
            answered = dataclasses.replace(last, answer=self._listed(listed[row]))
            sequences.append(self._builder.build([*before, answered]))
        for row, values in zip(asked, self._scores([scenes[row] for row in asked], sequences), strict=True):
            scores[row] = values
        return listed, scores, complete

    def _scores(self, scenes: Sequence[Scene], sequences: Sequence[TokenSequence]) -> list[np.ndarray]:
        """S (v, n) of the <SEG> tokens of every sequence."""
        out: list[np.ndarray] = []
        for batch in _batches(list(zip(scenes, sequences, strict=True)), self.batch_size):
            own, texts = zip(*batch, strict=True)
            length = bucket_length(max(map(len, texts)), self._lengths)
            most = max(len(text.seg_pos) for text in texts)
            # Long lists are cut by `class_names_per_prompt`; anything longer than the buckets gets its own size.
            slots = min((count for count in _PHRASES if count >= most), default=most)
            padded = pad_sequences(texts, length, slots, self.tokenizer.pad_id)
            arrays = (np.stack([scene.vision for scene in own]), padded["ids"], padded["seg_pos"])
            embed = np.stack([scene.embed for scene in own])
            inputs = (_fill(array, self.batch_size) for array in (*arrays, embed))
            logits = np.asarray(self._read(self._state, *inputs))
            out += [_average(logits[row, :, : len(text.seg_pos)], scene) for row, (scene, text) in enumerate(batch)]
        return out

    def _generate(
        self, scenes: Sequence[Scene], prompts: Sequence[TokenSequence], *, nouns: bool = True
    ) -> list[tuple[np.ndarray, np.ndarray, bool]]:
        """Answers: ids, S (v, n) of their <SEG> tokens, and whether they came to an end."""
        config = self._decoding
        if not nouns:
            suppress = tuple(sorted({*config.suppress, self.tokenizer.seg_id}))
            config = dataclasses.replace(config, seg_id=None, suppress=suppress)
        # The answer needs room as well.
        limit = self._lengths[-1]
        lengths = [length for length in self._lengths if length < limit] or [limit - 1]
        out = []
        for batch in _batches(list(zip(scenes, prompts, strict=True)), self.batch_size):
            own, texts = zip(*batch, strict=True)
            length = bucket_length(max(map(len, texts)), lengths)
            ids = pad_sequences(texts, length, _PHRASES[-1], self.tokenizer.pad_id)["ids"]
            counts = np.array([len(text) for text in texts], np.int32)
            arrays = (np.stack([scene.vision for scene in own]), ids, counts, np.stack([s.embed for s in own]))
            inputs = (_fill(array, self.batch_size) for array in arrays)
            written, logits = jax.device_get(self._write(self._state, *inputs, config=config))
            for row, scene in enumerate(own):
                scores = _average(logits[row, :, : int(written.seg_counts[row])], scene)
                out.append((written.ids[row, : int(written.lengths[row])], scores, bool(written.finished[row])))
        return out

    def _run_text(self, state, vision_bghc, ids_bt, seg_pos_bv, embed_bkqc) -> jax.Array:
        model = nnx.merge(self._graph, state)
        states = model.text(vision_bghc, ids_bt, num_blocks=model.config.noun_blocks)
        nouns = model.noun_states(states, seg_pos_bv)
        return _associate(model, nouns, embed_bkqc)

    def _run_generation(self, state, vision_bghc, ids_bt, lengths_b, embed_bkqc, config):
        model = nnx.merge(self._graph, state)
        written = generate(model.llm, model.embed_text(vision_bghc, ids_bt), lengths_b, config, lora=model.lora)
        return written, _associate(model, written.seg_hidden, embed_bkqc)


def _associate(model: Gella, nouns_bvd: jax.Array, embed_bkqc: jax.Array) -> jax.Array:
    """Association logits (b, k, v, q) for every colouring."""
    return jax.vmap(lambda embed: model.associate(nouns_bvd, embed), in_axes=1, out_axes=1)(embed_bkqc)


def _overlaps(logits_bqhw: jax.Array, label_map_bhw: jax.Array, inside_bhw: jax.Array, count: int) -> jax.Array:
    """IoU (b, q, n) of the model's masks with the entities of the label map, at the masks' resolution.

    `inside` tells the picture from its padding.
    """
    labels, inside = label_map_bhw[:, 2::4, 2::4], inside_bhw[:, 2::4, 2::4]
    wanted = (labels[..., None] == jnp.arange(1, count + 1)).astype(jnp.float32)
    masks = ((logits_bqhw > 0) & inside[:, None]).astype(jnp.float32)
    both = jnp.einsum("bqhw,bhwn->bqn", masks, wanted, precision=jax.lax.Precision.HIGHEST)
    union = masks.sum((2, 3))[:, :, None] + wanted.sum((1, 2))[:, None] - both
    return both / jnp.maximum(union, 1)


def _average(logits_kvq: np.ndarray, scene: Scene) -> np.ndarray:
    """S (v, n), the mean over the colourings."""
    return np.mean([decisions.entity_scores(*pair) for pair in zip(logits_kvq, scene.query, strict=True)], axis=0)


def _phrases(text: str, listed: Sequence[str], chosen: Sequence[np.ndarray], scores: np.ndarray):
    return tuple(
        GroundedPhrase(
            phrase,
            span,
            tuple(int(entity) for entity in entities),
            tuple(float(values[entity]) for entity in entities),
            float(values.max(initial=0)),
        )
        for phrase, span, entities, values in zip(listed, locate(text, listed), chosen, scores, strict=True)
    )


def _some_text(text: str) -> str:
    if not text.strip():
        raise ValueError("the text is empty; give a caption, an expression or a question")
    return text.strip()


def _batches(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _fill(array: np.ndarray, count: int) -> np.ndarray:
    """Repeats the last item until there are `count`."""
    return np.concatenate([array, np.repeat(array[-1:], count - len(array), axis=0)])
