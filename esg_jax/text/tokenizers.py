"""Tokenizers of the language models, all with three ids of ours behind their vocabulary: <image>, <pad>, <SEG>.

`encode` never produces a special token, whatever the text says; `esg_jax.text.sequences` puts them between pieces of
text by id. The libraries behind are optional and imported when a tokenizer is made.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from esg_jax.text.gguf_file import GgufFile

SPECIAL_TOKENS = ("<image>", "<pad>", "<SEG>")
_INSTALL = "pip install 'esg_jax[text]'"


class _Specials:
    """The ids all tokenizers share, given the size of the vocabulary proper.

    Attributes:
        num_pieces: ids of the original vocabulary; 32000 for LLaMA-2, 49152 for SmolLM2.
        bos_id, eos_id: of the original vocabulary.
        image_id, pad_id, seg_id: the three ids that follow it.
        vocab_size: all of these; the embedding may have more rows, which stay unused.
    """

    num_pieces: int
    bos_id: int
    eos_id: int
    prefix_space = False

    @property
    def image_id(self) -> int:
        return self.num_pieces

    @property
    def pad_id(self) -> int:
        return self.num_pieces + 1

    @property
    def seg_id(self) -> int:
        return self.num_pieces + 2

    @property
    def vocab_size(self) -> int:
        return self.num_pieces + len(SPECIAL_TOKENS)

    def _text_ids(self, ids: Sequence[int]) -> list[int]:
        """The ids that stand for text."""
        specials = {self.bos_id, self.eos_id}
        return [
            token for token in np.asarray(ids, np.int64).tolist() if token < self.num_pieces and token not in specials
        ]


class GgufTokenizer(_Specials):
    """Byte-level BPE from the metadata of a GGUF file (SmolLM2's: every digit is a token)."""

    def __init__(self, path: str | Path):
        """Reads vocabulary and merges.

        Raises:
            FileNotFoundError: no such file.
            ImportError: the package `tokenizers` is missing.
            ValueError: not a GGUF file, or another kind of tokenizer than SmolLM2's.
        """
        library = _import("tokenizers")
        fields = GgufFile(path).metadata
        kind = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
        if kind != ("gpt2", "smollm"):
            raise ValueError(f"{path} has a tokenizer of kind {kind[0]}/{kind[1]}; only gpt2/smollm is supported")
        pieces = fields["tokenizer.ggml.tokens"]
        merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
        vocabulary = {piece: index for index, piece in enumerate(pieces)}
        self._tokenizer = library.Tokenizer(library.models.BPE(vocabulary, merges))
        self._tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence(
            [
                library.pre_tokenizers.Digits(individual_digits=True),
                library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        self._tokenizer.decoder = library.decoders.ByteLevel()
        self.num_pieces = len(pieces)
        self.bos_id = fields["tokenizer.ggml.bos_token_id"]
        self.eos_id = fields["tokenizer.ggml.eos_token_id"]

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; special tokens are left out, broken UTF-8 becomes the replacement character."""
        return self._tokenizer.decode(self._text_ids(ids), skip_special_tokens=False)


class JsonTokenizer(_Specials):
    """A `tokenizer.json` of Hugging Face."""

    def __init__(self, path: str | Path, *, bos: str = "<s>", eos: str = "</s>"):
        """Reads the file.

        Args:
            path: the file or the folder that holds it.
            bos, eos: pieces that begin and end a text.

        Raises:
            FileNotFoundError: no such file.
            ImportError: the package `tokenizers` is missing.
            ValueError: not such a file, `bos` or `eos` is not in it, or it adds tokens where ours are.
        """
        library = _import("tokenizers")
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer at {path}")
        try:
            self._tokenizer = library.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(f"{path} is not a readable tokenizer.json: {error}") from error
        # "</s>" in a caption is text, not the end of the text.
        self._tokenizer.encode_special_tokens = True
        self.num_pieces = self._tokenizer.get_vocab_size(with_added_tokens=False)
        for token_id, token in self._tokenizer.get_added_tokens_decoder().items():
            if token_id >= self.num_pieces and not token.special:
                raise ValueError(f"{path} adds the token {token.content!r} with id {token_id}, which is taken by ours")
        self.bos_id, self.eos_id = (self._tokenizer.token_to_id(piece) for piece in (bos, eos))
        if None in (self.bos_id, self.eos_id):
            raise ValueError(f"{path} lacks the piece {bos!r} or {eos!r}; say with bos= and eos= what they are called")
        # SentencePiece writes a space as U+2581, byte-level BPE as U+0120.
        first = self._tokenizer.encode("a", add_special_tokens=False).tokens[0]
        self.prefix_space = first.startswith(("\u2581", "\u0120"))

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; special tokens are left out."""
        return self._tokenizer.decode(self._text_ids(ids), skip_special_tokens=False)


class SentencePieceTokenizer(_Specials):
    """A SentencePiece model, as LLaMA-2's and Vicuna's `tokenizer.model`; it puts a space before every text."""

    prefix_space = True

    def __init__(self, path: str | Path):
        """Reads the model.

        Raises:
            FileNotFoundError: no such file.
            ImportError: the package `sentencepiece` is missing.
            ValueError: not a SentencePiece model, or one without begin and end tokens.
        """
        library = _import("sentencepiece")
        path = Path(path)
        path = path / "tokenizer.model" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer at {path}")
        self._processor = library.SentencePieceProcessor()
        try:
            self._processor.Load(str(path))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path} is not a readable SentencePiece model: {error}") from error
        self.num_pieces = self._processor.vocab_size()
        self.bos_id, self.eos_id = self._processor.bos_id(), self._processor.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(f"{path} defines no begin or end token")

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without special tokens."""
        return self._processor.EncodeAsIds(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids without the space before it; special tokens are left out."""
        return self._processor.DecodeIds(self._text_ids(ids))


def open_tokenizer(path: str | Path) -> GgufTokenizer | JsonTokenizer | SentencePieceTokenizer:
    """The tokenizer in a file or folder: `.gguf`, `.model` (SentencePiece) or `.json`; SentencePiece first in a folder.

    Raises:
        FileNotFoundError: no such file, or a folder without one.
        ImportError: the library for it is missing.
        ValueError: an unknown or damaged file.
    """
    path = Path(path)
    if path.is_dir():
        for name in ("tokenizer.model", "tokenizer.json"):
            if (path / name).is_file():
                return open_tokenizer(path / name)
        raise FileNotFoundError(f"{path} holds neither tokenizer.model nor tokenizer.json")
    kinds = {".gguf": GgufTokenizer, ".model": SentencePieceTokenizer, ".json": JsonTokenizer}
    if path.suffix not in kinds:
        raise ValueError(f"{path.name}: a tokenizer file ends in {', '.join(kinds)}")
    return kinds[path.suffix](path)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"this tokenizer needs the package {name}: {_INSTALL}") from error
