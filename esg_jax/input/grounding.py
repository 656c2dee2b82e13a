"""Grain pipeline of GELLA: narratives to an endless, resumable stream of batches.

A batch is a dictionary (B samples, T tokens, V phrases, N = `max_entities`):

    image       uint8 (B, Sv, Sv, 3)   longer side Sv, bicubic, zero padded (`pad_position`)
    image_size  int32 (B, 2)           (height, width) of the content
    label_map   int16 (B, Sc, Sc)      0 nothing, k + 1 entity k; nearest neighbour, same geometry
    map_size    int32 (B, 2)
    ids         int32 (B, T)           the conversation, right padded
    answer      bool (B, T)            tokens with a loss
    seg_pos     int32 (B, V), seg_valid bool (B, V)    the <SEG> of every phrase
    links       bool (B, V, N)         phrase i means entity k
    linked      bool (B, V)            the phrase has a target
    task        int32 (B,)             index into `narratives.TASKS`
    reconstruct bool (B,)              only with `sampling="per_sample"`: the sample trains the masks

The task follows from the seed and the number of the step (`sampling="per_step"`: one task for the whole batch, the same
on all hosts) or of the sample.
"""

import dataclasses
import functools
import logging
import re
from collections.abc import Mapping
from typing import Any

import grain
import numpy as np

from esg_jax.config import from_dict
from esg_jax.input.grounding_readers import open_narratives
from esg_jax.input.narratives import TASKS, GroundingSourceConfig, Narrative, Narratives
from esg_jax.input.pipeline import endless, seed_of
from esg_jax.input.square import entity_map, square_image
from esg_jax.ops.padding import check_pad_position
from esg_jax.text.nouns import word_stems
from esg_jax.text.prompts import Prompts
from esg_jax.text.sequences import SequenceBuilder, Tokenizer, TokenSequence, Turn, pad_sequences

logger = logging.getLogger(__name__)

# Steps over which the ratios of the tasks hold exactly.
_BLOCK = 100


@dataclasses.dataclass(frozen=True)
class GroundingDataConfig:
    """Training data of GELLA.

    sources: a dictionary of `GroundingSourceConfig` fields under a name of your choice each.
    image_size: Sv, pixels; num_image_tokens: positions of a picture in the text, G * G.
    map_size: Sc, pixels, a multiple of 32.
    pad_position: where both squares are padded, "bottom_right" or on all sides ("center", as LLaVA does).
    max_entities: N; of more, the largest are kept.
    max_phrases: V; later phrases of a caption are left out.
    lengths: T of the three tasks: description, extraction, grounding.
    ratios: how often each task is drawn.
    sampling: "per_step" draws a task for every step: descriptions skip the masks in a program of their own;
        "per_sample" draws one for every sample: one program for all, of the longest of `lengths`.
    conversation, prompts: style of `Prompts` and the file with the wording (empty: the packaged one).
    with_count: answers begin with the number of phrases.
    hflip: probability of mirroring the picture, "left" and "right" in the caption with it.
    mismatched: probability that grounding is asked with a caption of another image, whose nouns are then not to be
        found, but for those that share a word with a caption of this one; they count for nothing. Captions name only
        what is there, so without this a model never learns to find nothing.
    batch_size: samples per step over all hosts.
    num_workers, num_threads, prefetch: as in `pipeline.DataConfig`.
    """

    sources: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    image_size: int = 336
    num_image_tokens: int = 576
    map_size: int = 1024
    pad_position: str = "bottom_right"
    max_entities: int = 100
    max_phrases: int = 64
    lengths: tuple[int, ...] = (1024, 1536, 1536)
    ratios: tuple[float, ...] = (0.2, 0.2, 0.6)
    sampling: str = "per_step"
    conversation: str = "vicuna"
    prompts: str = ""
    with_count: bool = True
    hflip: float = 0.0
    mismatched: float = 0.0
    batch_size: int = 16
    seed: int = 0
    num_workers: int = 0
    num_threads: int = 2
    prefetch: int = 2

    def __post_init__(self):
        for name in ("lengths", "ratios"):  # lists come from JSON and from command-line overrides
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if len(getattr(self, name)) != len(TASKS):
                raise ValueError(f"data.{name} needs one value for each of {', '.join(TASKS)}")
        if self.map_size % 32 or self.map_size <= 0:
            raise ValueError(f"data.map_size is {self.map_size}; it must be a positive multiple of 32")
        check_pad_position(self.pad_position, "data.pad_position")
        if min(self.ratios) < 0 or sum(self.ratios) <= 0:
            raise ValueError(f"data.ratios are {self.ratios}; they must not be negative, nor all zero")
        if not 0 <= self.mismatched < 1:
            raise ValueError(f"data.mismatched is {self.mismatched}; it must be at least 0 and below 1")
        if self.sampling not in ("per_step", "per_sample"):
            raise ValueError(f"data.sampling is {self.sampling!r}; choose per_step or per_sample")
        sources = {name: dataclasses.asdict(source) for name, source in self.source_configs().items()}
        object.__setattr__(self, "sources", sources)

    def length(self, task: int) -> int:
        """T of a batch with samples of a task."""
        return self.lengths[task] if self.sampling == "per_step" else max(self.lengths)

    def source_configs(self) -> dict[str, GroundingSourceConfig]:
        """The sources as dataclasses. Raises ValueError with the full path of an unknown field."""
        return {
            name: value
            if isinstance(value, GroundingSourceConfig)
            else from_dict(GroundingSourceConfig, value, f"data.sources.{name}")
            for name, value in self.sources.items()
        }


def train_iterator(
    config: GroundingDataConfig, tokenizer: Tokenizer, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
    """Endless batches of this host, with `get_state`/`set_state`; close it when done.

    Raises:
        ValueError, FileNotFoundError: a problem with the configuration or an annotation file; while iterating, with
            an image or a mask.
    """
    return endless(train_dataset(config, tokenizer, process_index, process_count), config)


def train_dataset(
    config: GroundingDataConfig, tokenizer: Tokenizer, process_index: int = 0, process_count: int = 1
) -> grain.MapDataset:
    """The random-access dataset behind `train_iterator`: element i is the host's batch of step i."""
    if not config.sources:
        raise ValueError("data.sources is empty; name at least one source")
    if config.batch_size % process_count:
        raise ValueError(f"data.batch_size {config.batch_size} does not divide among {process_count} hosts")
    prompts = Prompts.load(config.prompts or None, config.conversation)
    builder = SequenceBuilder(tokenizer, prompts, config.num_image_tokens)
    opened = {name: (open_narratives(source), source) for name, source in config.source_configs().items()}
    for name, (narratives, source) in opened.items():
        if not (narratives.complete or source.entity_masks):
            raise ValueError(
                f"data.sources.{name}: {source.reader} annotates only what is asked for; set entity_masks to masks of "
                "everything in its images (`esg predict` makes them)"
            )
    hosts = slice(process_index, None, process_count)
    per_step = config.sampling == "per_step"
    tasks: list[grain.MapDataset | None] = []
    for task, name in enumerate(TASKS):
        if not config.ratios[task]:
            tasks.append(None)
            continue
        streams, weights = [], []
        for number, (source_name, (narratives, source)) in enumerate(opened.items()):
            rows = _rows(narratives, name) if name in source.tasks and source.weight > 0 else np.zeros(0, np.int64)
            if not len(rows):
                continue
            logger.info("data source %s: %d of %d captions for %s", source_name, len(rows), len(narratives), name)
            stream = grain.MapDataset.source(_Rows(narratives, rows))
            stream = stream.seed(seed_of(config.seed, task, number)).shuffle().repeat()
            strangers = None
            if config.mismatched and task == 2 and narratives.kind == "caption":
                strangers = Strangers(narratives, rows)
            stream = stream.random_map(ExampleMaker(task, config, builder, strangers))
            streams.append(stream[hosts] if per_step else stream)
            weights.append(source.weight)
        if not streams:
            raise ValueError(f"data.ratios asks for {name}, for which no source has captions")
        mixed = streams[0] if len(streams) == 1 else grain.MapDataset.mix(streams, weights)
        tasks.append(mixed.batch(config.batch_size // process_count, drop_remainder=True) if per_step else mixed)
    picked = grain.MapDataset.source(TaskSchedule(config.ratios, config.seed)).map(_Pick(tuple(tasks)))
    return picked if per_step else picked[hosts].batch(config.batch_size // process_count, drop_remainder=True)


@dataclasses.dataclass(frozen=True)
class TaskSchedule:
    """Which task a step (or sample) has, and how many with that task came before it.

    Tasks are shuffled within blocks of 100 steps that hold them in the wanted ratios (rounded to whole steps by
    largest remainder), so the ratios hold at any time and a step's batch follows from its number.
    """

    ratios: tuple[float, ...]
    seed: int

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, step: int) -> tuple[int, int]:
        block, place = divmod(int(step), _BLOCK)
        order, before, counts = _block(self.ratios, self.seed, block)
        task = int(order[place])
        return task, block * int(counts[task]) + int(before[place])


@functools.lru_cache(maxsize=8)
def _block(ratios: tuple[float, ...], seed: int, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tasks of a block's steps, how often each task occurred before within it, and how often in all."""
    shares = np.asarray(ratios) / sum(ratios) * _BLOCK
    counts = np.floor(shares + 1e-9).astype(int)
    counts[np.argsort(counts - shares, kind="stable")[: _BLOCK - counts.sum()]] += 1
    order = np.random.default_rng((seed, block)).permutation(np.repeat(np.arange(len(ratios)), counts))
    before = np.zeros(_BLOCK, int)
    for task in range(len(ratios)):
        before[order == task] = np.arange(counts[task])
    return order, before, counts


@dataclasses.dataclass(frozen=True)
class _Pick:
    """(task, index) to the batch, or the sample, of that task."""

    tasks: tuple[grain.MapDataset | None, ...]

    def __call__(self, chosen: tuple[int, int]) -> dict[str, np.ndarray]:
        task, index = chosen
        return self.tasks[task][index]


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Chosen rows of a source, as a Grain random-access source."""

    narratives: Narratives
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Narrative:
        return self.narratives[int(self.rows[index])]


def _rows(narratives: Narratives, task: str) -> np.ndarray:
    if narratives.kind != "caption" and task != "grounding":
        return np.zeros(0, np.int64)  # an expression or a question describes no image and lists no nouns
    if task == "grounding":
        return np.flatnonzero(narratives.num_linked > 0)
    return np.flatnonzero(narratives.num_phrases > 0) if task == "extraction" else np.arange(len(narratives))


class Strangers:
    """Captions of other images, whose nouns a picture does not show."""

    def __init__(self, narratives: Narratives, rows: np.ndarray):
        """`rows`: the captions to draw from."""
        self._narratives, self._rows = narratives, rows
        self._words: dict[str, set[str]] = {}
        for row in range(len(narratives)):
            narrative = narratives[row]
            self._words.setdefault(narrative.record.name, set()).update(word_stems(narrative.caption))

    def __call__(self, narrative: Narrative, rng: np.random.Generator) -> tuple[str, list[tuple[str, int]], list[bool]]:
        """A caption, its phrases with their ends, and which of them no caption of `narrative`'s image speaks of."""
        other = self._narratives[int(rng.choice(self._rows))]
        told = self._words[narrative.record.name]
        absent = [not word_stems(phrase.text) & told for phrase in other.phrases]
        return other.caption, [(phrase.text, phrase.end) for phrase in other.phrases], absent


@dataclasses.dataclass(frozen=True)
class ExampleMaker:
    """One narrative to one sample of a batch (without the batch dimension)."""

    task: int
    config: GroundingDataConfig
    builder: SequenceBuilder
    strangers: Strangers | None = None

    def __call__(self, narrative: Narrative, rng: np.random.Generator) -> dict[str, np.ndarray]:
        config, prompts = self.config, self.builder.prompts
        questions = prompts.description if self.task == 0 else prompts.extraction
        question, flip = int(rng.integers(len(questions))), bool(rng.random() < config.hflip)
        caption, phrases = narrative.caption, [(phrase.text, phrase.end) for phrase in narrative.phrases]
        asked = narrative.kind == "question"
        absent: list[bool] | None = None
        if self.strangers is not None and rng.random() < config.mismatched:
            caption, phrases, absent = self.strangers(narrative, rng)
        sequence, count = self._sequence(caption, phrases[: config.max_phrases], question, flip, asked)
        text = pad_sequences([sequence], config.length(self.task), config.max_phrases, self.builder.tokenizer.pad_id)

        image = narrative.record.load_image()
        entities, meant = narrative.load_entities()
        if flip:
            image = image[:, ::-1]
            entities = dataclasses.replace(entities, layers=[layer[:, ::-1] for layer in entities.layers])
        pixels, image_size = square_image(image, config.image_size, config.pad_position)
        label_map, map_size, slots = entity_map(entities, config.map_size, config.max_entities, config.pad_position)
        lost = np.flatnonzero((slots < 0) & ~entities.crowd)
        if len(lost):
            logger.debug("image %s: entities %s are too small or too many for the label map",
                        narrative.record.name, [entities.ids[entity] for entity in lost])  # fmt: skip
        links = np.zeros((config.max_phrases, config.max_entities), bool)
        linked = np.zeros(config.max_phrases, bool)
        if self.task == 2:
            if absent is not None:
                linked[:count], meant = absent[:count], []
            for row, rows in enumerate(meant[:count]):
                kept = slots[list(rows)]
                links[row, kept[kept >= 0]] = True
                # Nothing answers the question: all pairs are negative.
                linked[row] = links[row].any() or (asked and not narrative.phrases[row].entities)
        mixed = {} if config.sampling == "per_step" else {"reconstruct": np.bool_(self.task != 0)}
        return {
            "image": pixels,
            "image_size": image_size,
            "label_map": label_map,
            "map_size": map_size,
            **{name: array[0] for name, array in text.items()},
            "links": links,
            "linked": linked,
            "task": np.int32(self.task),
            **mixed,
        }

    def _sequence(
        self, caption: str, phrases: list[tuple[str, int]], question: int, flip: bool, asked: bool
    ) -> tuple[TokenSequence, int]:
        """The conversation, and how many phrases its answer has; long captions lose their end."""
        length, prompts = self.config.length(self.task), self.builder.prompts
        words = len(caption.split())
        while True:
            shown = mirror_words(caption) if flip else caption
            if asked:
                turn = Turn(shown, prompts.reasoning_answer())
            elif self.task == 0:
                turn = Turn(prompts.description[question], shown)
            else:
                names = [mirror_words(text) if flip else text for text, _ in phrases]
                answer = prompts.list_answer(names, with_count=self.config.with_count)
                turn = Turn(prompts.extraction_question(shown, question), answer)
            sequence = self.builder.build([turn])
            if len(sequence) <= length:
                return sequence, len(phrases)
            words -= max(1, words // 8)
            if words < 1:
                raise ValueError(
                    f"data.lengths: {length} tokens are too few for a question with {self.config.num_image_tokens} "
                    "image tokens"
                )
            cut = list(re.finditer(r"\S+", caption))[words - 1].end()
            caption = caption[:cut]
            phrases = [phrase for phrase in phrases if phrase[1] <= cut]


def mirror_words(text: str) -> str:
    """Exchanges "left" and "right"."""

    def other(match: re.Match) -> str:
        word = "right" if match.group().lower() == "left" else "left"
        return word.capitalize() if match.group()[0].isupper() else word

    return re.sub(r"\b(left|right)\b", other, text, flags=re.IGNORECASE)
