"""AR_text: recall of the semantic nouns that a generated caption grounds (ESG Table 21).

The paper does not define it. Here: of the noun phrases annotated with a segment, the share that some grounded phrase of
the prediction names, over the whole set. Each prediction serves one annotated phrase at most, left to right. `strict`
wants the same head noun, `loose` any word in common, after lower-casing, removing determiners and singularising.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from esg_jax.evaluation.metrics.accumulator import Accumulator

_STOP = frozenset(
    "a an the this that these those some any each every its his her their our my your of in on at and or with".split()
)
_IRREGULAR = {
    "people": "person",
    "men": "man",
    "women": "woman",
    "children": "child",
    "feet": "foot",
    "teeth": "tooth",
    "geese": "goose",
    "mice": "mouse",
    "leaves": "leaf",
    "shelves": "shelf",
    "knives": "knife",
    "wolves": "wolf",
    "buses": "bus",
}
_UNCHANGED = frozenset("grass glass bus gas series species scissors pants trousers jeans shorts glasses".split())


def lemma(word: str) -> str:
    """Singular of an English noun by rule."""
    word = word.lower()
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word in _UNCHANGED or len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "sses", "xes", "zes", "oes")):
        return word[:-2]
    return word[:-1]


def words(phrase: str) -> list[str]:
    """Normalised words of a noun phrase; its head is the last."""
    return [lemma(w) for w in re.findall(r"[a-z0-9]+", phrase.lower()) if w not in _STOP]


class TextRecall(Accumulator):
    """AR_text, strict and loose."""

    unit = "caption"

    def add(self, caption_id: Any, predicted: Sequence[str], annotated: Sequence[str]) -> None:
        """Scores one caption: the grounded phrases of the prediction and of the ground truth, in text order."""
        target = [w for w in map(words, annotated) if w]
        pred = [w for w in map(words, predicted) if w]
        strict, loose = (_align(pred, target, same) for same in (_same_head, _common_word))
        strict, loose = (sum(match is not None for match in matches) for matches in (strict, loose))
        self._store(caption_id, (strict, loose, len(target)))

    def result(self) -> dict[str, Any]:
        """`AR_text_strict`, `AR_text_loose`, `num_phrases`."""
        strict, loose, total = (sum(column) for column in zip(*[(0, 0, 0), *self._ordered()], strict=True))
        nan = float("nan")
        return {
            "AR_text_strict": strict / total if total else nan,
            "AR_text_loose": loose / total if total else nan,
            "num_phrases": total,
        }


def align(predicted: Sequence[str], annotated: Sequence[str]) -> list[int | None]:
    """Which predicted phrase names each annotated one (strictly); None where none is left that does."""
    return _align([words(phrase) for phrase in predicted], [words(phrase) for phrase in annotated], _same_head)


def _align(pred: Sequence[list[str]], target: Sequence[list[str]], same: Callable) -> list[int | None]:
    free = list(range(len(pred)))
    out: list[int | None] = []
    for wanted in target:
        found = next((index for index in free if wanted and pred[index] and same(pred[index], wanted)), None)
        if found is not None:
            free.remove(found)
        out.append(found)
    return out


def _same_head(pred: list[str], target: list[str]) -> bool:
    return pred[-1] == target[-1]


def _common_word(pred: list[str], target: list[str]) -> bool:
    return bool(set(pred) & set(target))
