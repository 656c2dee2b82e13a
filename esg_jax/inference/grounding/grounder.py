"""Grounding with GELLA: one function per task, on any entity masks (ESG, section 4.2).

`Grounder.look` turns images and masks into scenes once; the tasks then ask about them. Where the phrases are known
(evaluation, category names, expressions), the answer is written down with them and read once ("forced"); otherwise
the model writes it ("generated").
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from esg_jax.config import from_dict
from esg_jax.inference.bundle import Bundle, open_bundle
from esg_jax.inference.engine import Engine
from esg_jax.inference.grounding import decisions
from esg_jax.inference.grounding.decisions import GroundingConfig
from esg_jax.inference.grounding.language_branch import LanguageBranch
from esg_jax.inference.grounding.results import CategoryResult, GroundedPhrase, GroundingResult, Scene
from esg_jax.inference.grounding.scene_encoder import SceneEncoder
from esg_jax.input.image_io import ImageLike
from esg_jax.interop.gguf import packaged_smollm2
from esg_jax.masks import MaskSet
from esg_jax.models.gella import Gella
from esg_jax.text.nouns import noun_phrases
from esg_jax.text.prompts import Prompts
from esg_jax.text.sequences import SequenceBuilder, Tokenizer, Turn, locate
from esg_jax.text.tokenizers import open_tokenizer
from esg_jax.weights import packaged_weights


def demo_grounder() -> Path:
    """The GELLA weights that ship with the package.

    Raises:
        FileNotFoundError: this installation has none.
    """
    return packaged_weights(
        "gella_demo.safetensors",
        "name GELLA weights (--model FILE.safetensors), convert a published checkpoint (`esg convert --help`), or "
        "train a small one (configs/gella_quickstart.py)",
    )


class Grounder:
    """Grounds text in the entities of images.

    A result does not depend on what else is in its batch, nor on the number of devices.

    Args:
        model: GELLA with a language model; its arrays may be those of a run in progress, on its mesh.
        tokenizer: of that language model.
        prompts: the wording it was trained with.
        config: thresholds and modes.
        batch_size: images per call of the network, rounded up to what divides over the devices.
        max_new_tokens: longest generated answer.
        nouns: who finds the noun phrases of a text when they are not given: "model", or "rule" for language models
            that have not learned to (`esg_jax.text.nouns`).
        with_count: answers begin with the number of phrases, as in training (`data.with_count`).
        seed: of the colours.
        mesh: batches and weights are split over it, see `Engine`; on several hosts all ask the same.

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
        mesh: Mesh | None = None,
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
        self._with_count, self._by_rule = with_count, nouns == "rule"
        self._builder = SequenceBuilder(tokenizer, self.prompts, model.config.num_image_tokens)
        engine = Engine(model, mesh)
        self.batch_size = engine.batch_size(batch_size)
        self.encode_scenes = SceneEncoder(engine, model.config, self.config, self.batch_size, seed)
        self._language = LanguageBranch(
            engine, model.config, tokenizer, batch_size=self.batch_size, max_new_tokens=max_new_tokens
        )

    @classmethod
    def from_checkpoint(
        cls, path: str | Path | None = None, *, dtype: Any = "float32", mesh: Mesh | None = None, **options: Any
    ) -> "Grounder":
        """A grounder with saved weights; None: the demo weights of the package. See `open_bundle`, `from_bundle`."""
        return cls.from_bundle(open_bundle(path or demo_grounder(), dtype=dtype, mesh=mesh), **options)

    @classmethod
    def from_bundle(
        cls,
        bundle: Bundle,
        *,
        tokenizer: str | None = None,
        conversation: str | None = None,
        prompts: str | Path | None = None,
        rules: Mapping[str, Any] | None = None,
        nouns: str | None = None,
        **options: Any,
    ) -> "Grounder":
        """A grounder with the weights of a file or of a run in progress.

        `bundle.info["grounding"]` may say `tokenizer`, `conversation`, `prompts`, `rules`, `nouns` and `with_count`;
        arguments override it.

        Args:
            bundle: the model, placed on the mesh on which it will run.
            tokenizer: file or folder for `open_tokenizer`, or "smollm2" for the packaged one.
            conversation, prompts: of `Prompts.load`.
            rules: fields of `GroundingConfig`.
            nouns: of `Grounder`; by default "rule" for weights that leave an untrained language model out.
            options: of `Grounder`.

        Raises:
            ValueError: no GELLA, no tokenizer named, an unknown rule.
        """
        known = bundle.info.get("grounding", {})
        config = from_dict(GroundingConfig, {**known.get("rules", {}), **(rules or {})}, "rule")
        tokenizer = tokenizer or known.get("tokenizer")
        if not tokenizer:
            raise ValueError(f"{bundle.name} does not say which tokenizer it needs; give --tokenizer")
        words = open_tokenizer(packaged_smollm2() if tokenizer == "smollm2" else tokenizer)
        style = conversation or known.get("conversation", "vicuna")
        wording = Prompts.load(prompts or known.get("prompts") or None, style)
        # Weights that leave the language model out have it untrained: it never writes <SEG>.
        nouns = nouns or known.get("nouns", "rule" if "llm_weights" in bundle.info else "model")
        options = {"with_count": known.get("with_count", True), **options}
        return cls(bundle.load_as(Gella), words, wording, config, nouns=nouns, **options)

    @property
    def max_entities(self) -> int:
        """Masks per image that the model can tell apart."""
        return self.model_config.num_queries

    def look(self, images: Sequence[ImageLike], masks: Sequence[MaskSet]) -> list[Scene]:
        """Encodes images with their masks.

        Args:
            images: paths, or RGB uint8 (h, w, 3) each.
            masks: of the same sizes, from `disjoint_masks`.

        Raises:
            ValueError: sizes differ, no masks, or more than `max_entities`.
        """
        return self.encode_scenes(images, masks, self.config)

    # Tasks.

    def describe(self, scenes: Sequence[Scene], question: str | None = None) -> list[str]:
        """Writes a caption of every image."""
        turn = Turn(question or self.prompts.description[0])
        written = self._language.generate(scenes, [self._builder.build([turn])] * len(scenes), nouns=False)
        return [self._builder.text(ids) for ids, _, _ in written]

    def extract(self, scenes: Sequence[Scene], texts: Sequence[str]) -> list[list[str]]:
        """The noun phrases of texts, listed by the model (or found by rule)."""
        if self._by_rule:
            return [noun_phrases(text) for text in texts]
        prompts = [self._builder.build([self._extraction(text)]) for text in texts]
        return [self._builder.phrases(ids) for ids, _, _ in self._language.generate(scenes, prompts)]

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
            answers = [("", values, True) for values in self._language.scores(scenes, sequences)]
        else:
            if self.model_config.noun_blocks is not None:
                raise ValueError("this model reads nouns early (noun_blocks) and answers in no words; leave forced on")
            written = self._language.generate(scenes, [self._builder.build([Turn(question)]) for question in questions])
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
            for total, scores in zip(totals, self._language.scores(scenes, [sequence] * len(scenes)), strict=True):
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
            written = self._language.generate([scenes[row] for row in asked], prompts)
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
        for row, values in zip(asked, self._language.scores([scenes[row] for row in asked], sequences), strict=True):
            scores[row] = values
        return listed, scores, complete


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
