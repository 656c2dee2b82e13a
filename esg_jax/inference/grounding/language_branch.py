"""Text about scenes through the language branch of a GELLA: read once with what is asked, or written by the model."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from esg_jax import sharding
from esg_jax.inference.engine import Engine, batches, fill
from esg_jax.inference.grounding import decisions
from esg_jax.inference.grounding.decoding import DecodingConfig, generate
from esg_jax.inference.grounding.results import Scene
from esg_jax.models.gella import Gella, GellaConfig
from esg_jax.text.sequences import Tokenizer, TokenSequence, bucket_length, pad_sequences

_LENGTHS = (128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
_PHRASES = (8, 64, 160, 512)


class LanguageBranch:
    """Scores of `<SEG>` tokens with the entities of scenes.

    Programs are compiled per bucket of text length and of number of phrases, always for `batch_size` images.

    Args:
        engine: with a GELLA that has a language model.
        model: its configuration.
        tokenizer: of the language model.
        batch_size: images per call.
        max_new_tokens: longest generated answer.
    """

    def __init__(
        self, engine: Engine, model: GellaConfig, tokenizer: Tokenizer, *, batch_size: int, max_new_tokens: int
    ):
        self._engine, self._tokenizer, self._batch_size = engine, tokenizer, batch_size
        limit = model.llm.max_length
        self._lengths = sorted({length for length in _LENGTHS if length < limit} | {limit})
        self._read = engine.whole_batch(_read)
        self._write = engine.whole_batch(_write)
        specials = {tokenizer.image_id, tokenizer.pad_id, tokenizer.bos_id} - {tokenizer.eos_id}
        self._decoding = DecodingConfig(
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            max_new_tokens=min(max_new_tokens, limit - 1),
            seg_id=tokenizer.seg_id,
            seg_hidden=model.seg_hidden,
            suppress=tuple(sorted(specials)),
            vocab_size=tokenizer.vocab_size,
        )

    def scores(self, scenes: Sequence[Scene], sequences: Sequence[TokenSequence]) -> list[np.ndarray]:
        """S (v, n) of the `<SEG>` tokens of every sequence."""
        out: list[np.ndarray] = []
        for batch in batches(list(zip(scenes, sequences, strict=True)), self._batch_size):
            own, texts = zip(*batch, strict=True)
            length = bucket_length(max(map(len, texts)), self._lengths)
            most = max(len(text.seg_pos) for text in texts)
            # Long lists are cut by `class_names_per_prompt`; anything longer than the buckets gets its own size.
            slots = min((count for count in _PHRASES if count >= most), default=most)
            padded = pad_sequences(texts, length, slots, self._tokenizer.pad_id)
            logits = self._run(self._read, own, padded["ids"], padded["seg_pos"])
            out += [_average(logits[row, :, : len(text.seg_pos)], scene) for row, (scene, text) in enumerate(batch)]
        return out

    def generate(
        self, scenes: Sequence[Scene], prompts: Sequence[TokenSequence], *, nouns: bool = True
    ) -> list[tuple[np.ndarray, np.ndarray, bool]]:
        """Answers, with `<SEG>` tokens or without: ids, S (v, n) of these tokens, and whether they came to an end."""
        config = self._decoding
        if not nouns:
            suppress = tuple(sorted({*config.suppress, self._tokenizer.seg_id}))
            config = dataclasses.replace(config, seg_id=None, suppress=suppress)
        # The answer needs room as well.
        limit = self._lengths[-1]
        lengths = [length for length in self._lengths if length < limit] or [limit - 1]
        out = []
        for batch in batches(list(zip(scenes, prompts, strict=True)), self._batch_size):
            own, texts = zip(*batch, strict=True)
            length = bucket_length(max(map(len, texts)), lengths)
            ids = pad_sequences(texts, length, _PHRASES[-1], self._tokenizer.pad_id)["ids"]
            counts = np.array([len(text) for text in texts], np.int32)
            written, logits = self._run(self._write, own, ids, counts, config=config)
            for row, scene in enumerate(own):
                scores = _average(logits[row, :, : int(written.seg_counts[row])], scene)
                out.append((written.ids[row, : int(written.lengths[row])], scores, bool(written.finished[row])))
        return out

    def _run(self, program, scenes: Sequence[Scene], *arrays: np.ndarray, **static):
        seen = (np.stack([scene.vision for scene in scenes]), np.stack([scene.embed for scene in scenes]))
        inputs = (fill(array, self._batch_size) for array in (*seen, *arrays))
        return self._engine.fetch(program(*inputs, **static))


def _read(model: Gella, vision_bghc, embed_bkqc, ids_bt, seg_pos_bv) -> jax.Array:
    states = model.text(vision_bghc, ids_bt, num_blocks=model.config.noun_blocks, pin=sharding.pin_batch)
    return _associate(model, model.noun_states(states, seg_pos_bv), embed_bkqc)


def _write(model: Gella, vision_bghc, embed_bkqc, ids_bt, lengths_b, *, config: DecodingConfig):
    prompt = model.embed_text(vision_bghc, ids_bt)
    written = generate(model.llm, prompt, lengths_b, config, lora=model.lora, pin=sharding.pin_batch)
    return written, _associate(model, written.seg_hidden, embed_bkqc)


def _associate(model: Gella, nouns_bvd: jax.Array, embed_bkqc: jax.Array) -> jax.Array:
    """Association logits (b, k, v, q) for every colouring."""
    return jax.vmap(lambda embed: model.associate(nouns_bvd, embed), in_axes=1, out_axes=1)(embed_bkqc)


def _average(logits_kvq: np.ndarray, scene: Scene) -> np.ndarray:
    """S (v, n), the mean over the colourings."""
    return np.mean([decisions.entity_scores(*pair) for pair in zip(logits_kvq, scene.query, strict=True)], axis=0)
