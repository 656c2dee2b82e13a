"""Token ids of conversations, built piece by piece.

Text between special tokens is encoded on its own and the special ids are put in between; no string with special
tokens in it is ever tokenised, and the masks follow from the pieces. An answer starts a new piece, so that training
sees the ids that generation continues from.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Int32

from esg_jax.text.prompts import Piece, Prompts, Special, merge_text


class Tokenizer(Protocol):
    """What is asked of a tokenizer; `esg_jax.text.tokenizers` has implementations.

    `encode` adds no special tokens. A tokenizer whose `encode` puts a space before every text (SentencePiece) says so
    with an attribute ``prefix_space = True``; one leading space of a piece is then left to it.
    """

    bos_id: int
    eos_id: int
    pad_id: int
    image_id: int
    seg_id: int
    vocab_size: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclasses.dataclass(frozen=True)
class Turn:
    """A question and its answer; None for the turn that the model is to answer.

    The answer is text or pieces; `Prompts` makes the pieces of the tasks.
    """

    question: str
    answer: str | Sequence[Piece] | None = None


@dataclasses.dataclass(frozen=True)
class TokenSequence:
    """A conversation as ids.

    Attributes:
        ids: token ids; the image id is repeated once per image token.
        answer: tokens that belong to an answer, its <SEG> and its end included.
        seg_pos: positions of all <SEG> tokens.
    """

    ids: Int32[np.ndarray, "t"]
    answer: Bool[np.ndarray, "t"]
    seg_pos: Int32[np.ndarray, "v"]

    def __len__(self) -> int:
        return len(self.ids)


class SequenceBuilder:
    """Conversations to ids.

    Args:
        tokenizer: see `Tokenizer`.
        prompts: the wording.
        num_image_tokens: positions that the picture takes, G * G.
    """

    def __init__(self, tokenizer: Tokenizer, prompts: Prompts, num_image_tokens: int):
        if num_image_tokens < 1:
            raise ValueError(f"num_image_tokens is {num_image_tokens}; it must be positive")
        self.tokenizer, self.prompts, self.num_image_tokens = tokenizer, prompts, num_image_tokens

    def build(self, turns: Sequence[Turn], *, image: bool = True) -> TokenSequence:
        """Ids of a conversation; the picture appears in the first turn (`image=False`: not at all).

        Raises:
            ValueError: no turn, a turn other than the last without an answer, or an empty question.
        """
        if not turns:
            raise ValueError("a conversation needs at least one turn")
        ids: list[int] = []
        answer: list[bool] = []

        def add(pieces: Sequence[Piece], is_answer: bool) -> None:
            new = self.encode(pieces)
            ids.extend(new)
            answer.extend([is_answer] * len(new))

        opening = self.prompts.start()
        for number, turn in enumerate(turns):
            if not turn.question.strip():
                raise ValueError(f"the question of turn {number + 1} is empty")
            add(merge_text([*opening, *self.prompts.user(turn.question, image=image and number == 0)]), False)
            if turn.answer is None:
                if number + 1 < len(turns):
                    raise ValueError(f"turn {number + 1} of {len(turns)} has no answer; only the last may lack it")
                break
            pieces = [turn.answer] if isinstance(turn.answer, str) else turn.answer
            add(self.prompts.answer(pieces), True)
            opening = self.prompts.between()
        array = np.array(ids, np.int32)
        positions = np.flatnonzero(array == self.tokenizer.seg_id).astype(np.int32)
        return TokenSequence(array, np.array(answer, bool), positions)

    def encode(self, pieces: Sequence[Piece]) -> list[int]:
        """Ids of pieces; every text is encoded on its own."""
        special = {Special.BOS: "bos_id", Special.EOS: "eos_id", Special.IMAGE: "image_id", Special.SEG: "seg_id"}
        prefix_space = getattr(self.tokenizer, "prefix_space", False)
        ids: list[int] = []
        for piece in pieces:
            if isinstance(piece, str):
                ids += self.tokenizer.encode(piece.removeprefix(" ") if prefix_space else piece)
            else:
                count = self.num_image_tokens if piece is Special.IMAGE else 1
                ids += [getattr(self.tokenizer, special[piece])] * count
        return ids

    def decode(self, ids: Sequence[int]) -> list[Piece]:
        """Pieces of (generated) ids up to the padding: the inverse of `encode`; a run of image ids is one piece."""
        tokenizer = self.tokenizer
        special = {
            tokenizer.bos_id: Special.BOS,
            tokenizer.eos_id: Special.EOS,
            tokenizer.image_id: Special.IMAGE,
            tokenizer.seg_id: Special.SEG,
        }
        out: list[Piece] = []
        text: list[int] = []
        for token in [*(int(token) for token in ids), tokenizer.pad_id]:
            if token not in special and token != tokenizer.pad_id:
                text.append(token)
                continue
            if text:
                out.append(tokenizer.decode(text))
                text = []
            if token == tokenizer.pad_id and token not in special:
                break
            if not (special[token] is Special.IMAGE and out and out[-1] is Special.IMAGE):
                out.append(special[token])
        return out

    def phrases(self, ids: Sequence[int]) -> list[str]:
        """The noun phrase before every <SEG> of an answer's ids."""
        return self.prompts.phrases_of(self.decode(ids))

    def text(self, ids: Sequence[int]) -> str:
        """The text of an answer's ids, without special tokens."""
        parts = (piece.strip() for piece in self.decode(ids) if isinstance(piece, str))
        return re.sub(r" ([,.;:!?])", r"\1", " ".join(parts)).strip()


def bucket_length(length: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `length` tokens.

    Raises:
        ValueError: none does.
    """
    fitting = [bucket for bucket in buckets if bucket >= length]
    if not fitting:
        raise ValueError(
            f"the text takes {length} tokens with its picture, more than the {max(buckets)} allowed; shorten it, or "
            "allow longer sequences if the model has been trained for them"
        )
    return min(fitting)


def pad_sequences(
    sequences: Sequence[TokenSequence], length: int, max_phrases: int, pad_id: int
) -> dict[str, np.ndarray]:
    """Right-padded arrays of a batch.

    Returns:
        ids int32 (B, T), answer bool (B, T), seg_pos int32 (B, V), seg_valid bool (B, V).

    Raises:
        ValueError: a sequence has more tokens or more <SEG> than there is room for.
    """
    count = len(sequences)
    out = {
        "ids": np.full((count, length), pad_id, np.int32),
        "answer": np.zeros((count, length), bool),
        "seg_pos": np.zeros((count, max_phrases), np.int32),
        "seg_valid": np.zeros((count, max_phrases), bool),
    }
    for row, sequence in enumerate(sequences):
        bucket_length(len(sequence), (length,))
        phrases = len(sequence.seg_pos)
        if phrases > max_phrases:
            raise ValueError(f"{phrases} phrases, more than the {max_phrases} there is room for (max_phrases)")
        out["ids"][row, : len(sequence)] = sequence.ids
        out["answer"][row, : len(sequence)] = sequence.answer
        out["seg_pos"][row, :phrases] = sequence.seg_pos
        out["seg_valid"][row, :phrases] = True
    return out


def locate(text: str, phrases: Sequence[str]) -> list[tuple[int, int] | None]:
    """Character spans of phrases in `text`, in order of appearance, case ignored; None for one that does not occur.

    A phrase is looked for after the end of the one before it, as whole words, then from the beginning.
    """
    lower, position = text.lower(), 0
    out: list[tuple[int, int] | None] = []
    for phrase in phrases:
        wanted = phrase.lower()
        start = _find_word(lower, wanted, position)
        if start < 0:
            start = _find_word(lower, wanted, 0)
        if start < 0:
            out.append(None)
            continue
        out.append((start, start + len(wanted)))
        position = max(position, start + len(wanted))
    return out


def _find_word(text: str, wanted: str, position: int) -> int:
    if not wanted:
        return -1
    while (start := text.find(wanted, position)) >= 0:
        end = start + len(wanted)
        if not (text[start - 1 : start].isalnum() and wanted[0].isalnum()) and not (
            text[end : end + 1].isalnum() and wanted[-1].isalnum()
        ):
            return start
        position = start + 1
    return -1
