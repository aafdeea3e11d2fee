"""Rows of data as a model trains on them."""

from __future__ import annotations

from dataclasses import dataclass

from ..nn import IGNORED


@dataclass(frozen=True)
class Example:
    """Token ids, and the same as labels where they are to be predicted, IGNORED elsewhere."""

    ids: list[int]
    labels: list[int]

    @classmethod
    def of(cls, ids: list[int], targets: int) -> Example:
        """The last ``targets`` ids are to be predicted."""
        context = len(ids) - targets
        return cls(ids, [IGNORED] * context + ids[context:])

    @property
    def targets(self) -> int:
        """How many tokens are to be predicted."""
        return len(self.labels) - self.labels.count(IGNORED)

    @property
    def tail(self) -> int:
        """How many tokens there are from the first that is to be predicted."""
        return next((len(self.labels) - i for i, label in enumerate(self.labels) if label != IGNORED), 0)
