"""The checks of an artifact or of a merged folder."""

from __future__ import annotations

from dataclasses import dataclass

from graftc.specs.records.record import Record, stated


@dataclass(frozen=True)
class Check(Record):
    """One check of an artifact."""

    name: str
    """The name of the check."""

    passed: bool | None
    """Whether it holds; null where it was not done."""

    detail: str
    """The finding, or why the check was not done, for people."""


@dataclass(frozen=True)
class RowReuse(Record):
    """How far a row's keys and values equal the base's."""

    start: int
    """Position of the row's first adapted token; -1 where it has none."""

    equal: int
    """The number of tokens, from the first on, whose keys and values in all layers equal the base's bit for bit."""


@dataclass(frozen=True)
class CacheReuse(Record):
    """Whether an adapted model can continue the base's cache of a text, and the base the adapted model's."""

    rows: tuple[RowReuse, ...]
    """The rows of the batch."""

    tokens: int
    """The number of tokens of each row, including padding."""

    tensors: int
    """The number of tensors compared: the keys and the values of each layer."""

    continued: bool | None
    """Whether the adapted model gives the same logits, bit for bit, when it continues the base's cache as when it
    continues its own, both cut before the first invocation of the batch; null where that is at the start or missing."""

    @stated
    def passed(self) -> bool:
        """Whether all tokens before the invocation have the base's keys and values, and a continuation equals."""
        before = ((row.start if row.start >= 0 else self.tokens, row.equal) for row in self.rows)
        return self.continued is not False and all(equal >= start for start, equal in before)
