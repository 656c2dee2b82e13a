"""What all metrics have in common: records per image (or video), refused duplicates, exact merging."""

from typing import Any, Self

from esg_jax.evaluation.metrics.errors import EvaluationError


class Accumulator:
    """Base of the streaming metrics: `add(...)` per image, `merge(other)` across hosts, `result()` at the end.

    Subclasses keep one small record per image under its id, never a full-resolution mask, and reduce them in the order
    of the ids: the result does not depend on the order of `add`, nor on how images were spread over hosts. Objects are
    picklable, so a host can send or store its part.
    """

    unit = "image"

    def __init__(self) -> None:
        self._records: dict[Any, Any] = {}

    def __len__(self) -> int:
        return len(self._records)

    def _store(self, key: Any, record: Any) -> None:
        if key in self._records:
            raise EvaluationError(f"{self.unit} {key} was added twice; score every {self.unit} once")
        self._records[key] = record

    def _ordered(self) -> list[Any]:
        return [self._records[key] for key in sorted(self._records)]

    def merge(self, other: Self) -> Self:
        """Adds the records of `other` (same metric, same settings, other images) and returns self.

        Raises:
            EvaluationError: another metric or other settings, or an image that both hold.
        """
        if type(other) is not type(self) or other._settings() != self._settings():
            raise EvaluationError("only results of the same metric with the same settings can be merged")
        for key, record in other._records.items():
            self._store(key, record)
        return self

    def _settings(self) -> dict[str, Any]:
        """Everything but the records: what two parts must agree on."""
        return {name: value for name, value in vars(self).items() if name != "_records"}

    def result(self) -> dict[str, Any]:
        """The metric's numbers as fractions; NaN where the set leaves them undefined."""
        raise NotImplementedError
