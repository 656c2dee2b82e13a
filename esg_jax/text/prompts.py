"""Wording of questions and answers, read from a YAML file, as pieces of text and special tokens.

The paper's own wording is not public; the default file holds ours. Templates are cut at their special tokens when the
file is read and filled in later, so no caption or question can smuggle a special token in.
"""

import dataclasses
import enum
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

DEFAULT_FILE = Path(__file__).with_name("prompts.yaml")


class Special(enum.Enum):
    """Special tokens that a template may name."""

    BOS = "<bos>"
    EOS = "<eos>"
    IMAGE = "<image>"
    SEG = "<seg>"


Piece = str | Special

_SPECIALS = re.compile("|".join(re.escape(special.value) for special in Special))
_FIELD = re.compile(r"\{(\w+)\}")
# Path in the file -> the fields that its template must have.
_FIELDS = {
    ("conversation", "start"): {"system"},
    ("conversation", "image"): set(),
    ("conversation", "user"): {"image", "question"},
    ("conversation", "answer"): {"answer"},
    ("conversation", "between"): set(),
    ("questions", "categories"): {"names"},
    ("answers", "counted"): {"count", "phrases"},
    ("answers", "counted_one"): {"count", "phrases"},
    ("answers", "counted_none"): set(),
    ("answers", "uncounted"): {"phrases"},
    ("answers", "uncounted_none"): set(),
    ("answers", "phrase"): {"phrase"},
    ("answers", "separator"): set(),
    ("answers", "last_separator"): set(),
    ("answers", "reasoning"): {"phrase"},
    ("answers", "reasoning_bare"): set(),
}
_LISTS = {"description": set(), "extraction": {"text"}}


@dataclasses.dataclass(frozen=True)
class Prompts:
    """All wording of one conversation style.

    Attributes:
        system: the system sentence.
        templates: (section, name) -> template of the file.
        description, extraction: question templates; the latter with the field `text`.
    """

    system: str
    templates: Mapping[tuple[str, str], str]
    description: tuple[str, ...]
    extraction: tuple[str, ...]

    @classmethod
    def load(cls, path: str | Path | None = None, conversation: str = "vicuna") -> "Prompts":
        """Reads the packaged file, overridden by the entries of the file at `path`.

        Args:
            path: YAML file with the structure of `prompts.yaml`; entries it lacks keep the packaged wording.
            conversation: entry of `conversations`: "vicuna", "chatml", or one that the file adds.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not YAML, an unknown entry, or a template without its fields; names file and entry.
        """
        content, name = _read(DEFAULT_FILE), str(path or DEFAULT_FILE)
        if path is not None:
            known = {section: set(entries) for section, entries in content.items()}
            content = _merge(content, _read(Path(path)))
            for section, entries in content.items():
                unknown = set(entries) - known.get(section, set()) if section != "conversations" else set()
                if section not in known or unknown:
                    raise ValueError(f"{name}: unknown entry {section}.{min(unknown, default='')}".rstrip("."))
        styles = content["conversations"]
        if conversation not in styles:
            raise ValueError(f"{name} has no conversation {conversation!r}; it has {', '.join(sorted(styles))}")
        sections = {"conversation": styles[conversation], **content}
        templates = {}
        for (section, entry), fields in _FIELDS.items():
            template = sections[section].get(entry)
            _check(template, fields, f"{name}: {section}.{entry}")
            templates[section, entry] = template
        lists = {}
        for entry, fields in _LISTS.items():
            questions = content["questions"][entry]
            if not isinstance(questions, list) or not questions:
                raise ValueError(f"{name}: questions.{entry} must be a list of questions")
            for template in questions:
                _check(template, fields, f"{name}: questions.{entry}")
            lists[entry] = tuple(questions)
        return cls(styles[conversation]["system"], templates, **lists)

    def start(self) -> list[Piece]:
        """What opens every conversation."""
        return self._fill("conversation", "start", system=self.system)

    def user(self, question: str, *, image: bool) -> list[Piece]:
        """A question up to where the answer begins; `image` puts the picture before it (first turn)."""
        picture = self._fill("conversation", "image") if image else ""
        return self._fill("conversation", "user", image=picture, question=question)

    def answer(self, pieces: Sequence[Piece]) -> list[Piece]:
        """An answer and what ends it."""
        return self._fill("conversation", "answer", answer=list(pieces))

    def between(self) -> list[Piece]:
        """What separates an answer from the next question."""
        return self._fill("conversation", "between")

    def extraction_question(self, text: str, index: int = 0) -> str:
        """Question `index` about the noun phrases of `text`."""
        return self.extraction[index].replace("{text}", text)

    def category_sentence(self, names: Sequence[str]) -> str:
        """The sentence that names all categories."""
        listed = "".join(self._joined([[name] for name in names]))
        return self.templates["questions", "categories"].replace("{names}", listed)

    def list_answer(self, phrases: Sequence[str], *, with_count: bool = True) -> list[Piece]:
        """The answer that lists noun phrases, a <SEG> after each, in order (spec of the paper: count first)."""
        kind = "counted" if with_count else "uncounted"
        if not phrases:
            return self._fill("answers", f"{kind}_none")
        if with_count and len(phrases) == 1:
            kind = "counted_one"
        listed = self._joined([self._fill("answers", "phrase", phrase=phrase) for phrase in phrases])
        return self._fill("answers", kind, count=number_word(len(phrases)), phrases=listed)

    def reasoning_answer(self, phrase: str | None = None) -> list[Piece]:
        """The answer to a question about one thing, with its name or as a bare <SEG>."""
        if phrase is None:
            return self._fill("answers", "reasoning_bare")
        return self._fill("answers", "reasoning", phrase=phrase)

    def phrases_of(self, pieces: Sequence[Piece]) -> list[str]:
        """The phrase before every <SEG> of an answer, without the wording around it.

        An answer that does not follow the wording gives the text between one <SEG> and the next.
        """
        out, text = [], ""
        for piece in pieces:
            if isinstance(piece, str):
                text += piece
            elif piece is Special.SEG:
                out.append(self._bare(text, first=not out))
                text = ""
        return out

    def _bare(self, text: str, first: bool) -> str:
        text = text.strip()
        if first:
            opening = [self.templates["answers", kind] for kind in ("counted", "counted_one", "reasoning")]
            for template in opening:
                before = _FIELD.split(template.split("{phrase", 1)[0])[0::2]
                match = re.match(r"[\w\s-]+?".join(map(re.escape, (part for part in before))), text)
                if match:
                    return text[match.end() :].strip()
            return text
        # Tokenizers may or may not give back the space at the start of a piece.
        for separator in ("last_separator", "separator"):
            mark = self.templates["answers", separator].strip()
            if text.startswith(mark) and not text[len(mark) : len(mark) + 1].isalnum():
                return text[len(mark) :].strip()
        return text

    def _joined(self, items: Sequence[Sequence[Piece]]) -> list[Piece]:
        out: list[Piece] = []
        for number, item in enumerate(items):
            if number:
                last = "last_separator" if number == len(items) - 1 else "separator"
                out.append(self.templates["answers", last])
            out += item
        return merge_text(out)

    def _fill(self, section: str, entry: str, **fields: str | list[Piece]) -> list[Piece]:
        out: list[Piece] = []
        for piece in split_specials(self.templates[section, entry]):
            if isinstance(piece, Special):
                out.append(piece)
                continue
            for number, part in enumerate(_FIELD.split(piece)):
                value = fields[part] if number % 2 else part
                out += [value] if isinstance(value, str) else value
        return merge_text(out)


def split_specials(template: str) -> list[Piece]:
    """Cuts a template at the names of special tokens."""
    out: list[Piece] = []
    position = 0
    for match in _SPECIALS.finditer(template):
        out += [template[position : match.start()], Special(match.group())]
        position = match.end()
    return merge_text([*out, template[position:]])


def merge_text(pieces: Sequence[Piece]) -> list[Piece]:
    """Joins neighbouring texts and drops empty ones."""
    out: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, str) and out and isinstance(out[-1], str):
            out[-1] += piece
        elif piece != "":
            out.append(piece)
    return out


_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def number_word(number: int) -> str:
    """English word of 0..999; digits beyond."""
    if not 0 <= number < 1000:
        return str(number)
    if number < 20:
        return _ONES[number]
    if number < 100:
        ten, one = divmod(number, 10)
        return _TENS[ten - 2] + (f"-{_ONES[one]}" if one else "")
    hundred, rest = divmod(number, 100)
    return f"{_ONES[hundred]} hundred" + (f" {number_word(rest)}" if rest else "")


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"file of prompts not found: {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(section, dict) for section in content.values()):
        raise ValueError(f"{path} must hold the sections conversations, questions, answers")
    return content


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merge(out[key], value) if both else value
    return out


def _check(template: Any, fields: set[str], name: str) -> None:
    if not isinstance(template, str):
        raise ValueError(f"{name} is missing or no text")
    found = set(_FIELD.findall(template))
    if found != fields:
        wanted = ", ".join(f"{{{field}}}" for field in sorted(fields)) or "no field"
        raise ValueError(f"{name} is {template!r}; it must have {wanted}")
