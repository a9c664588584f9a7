"""Patterns with the fields of a row in their slots, cut to a length: fields only, the longest first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graftc.runtime.pet.blanks import BLANK, BlankTokenizer
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.text import quoted
from graftc.specs.pet.pattern import PatternPart, PatternSpec

__all__ = ["FilledPattern", "shortened_counts"]


def shortened_counts(counts: Sequence[int], surplus: int) -> list[int]:
    """How many tokens of each slot stay when so many have to go: always one of the longest, of these the last.

    Args:
        counts: tokens of each slot.
        surplus: tokens that are too many; at most all of them go.
    """
    if surplus >= sum(counts):
        return [0] * len(counts)
    low, high = 0, max(counts, default=0)
    while low < high:  # the highest level that takes enough away
        level = (low + high + 1) // 2
        enough = sum(max(0, count - level) for count in counts) >= surplus
        low, high = (level, high) if enough else (low, level - 1)
    kept = [min(count, low) for count in counts]
    spare = sum(counts) - sum(kept) - surplus
    for index, count in enumerate(counts):
        if spare and count > low:
            kept[index] += 1
            spare -= 1
    return kept


class FilledPattern:
    """A pattern ready to be filled.

    Args:
        pattern: the pattern.
        tokenizer: what makes tokens of it.
        limit: tokens that there may be.

    Raises:
        GraftError: GC179, it leaves no room for a row, writes a special token, or has its blank where such a model has
            none.
    """

    def __init__(self, pattern: PatternSpec, tokenizer: BlankTokenizer, limit: int) -> None:
        self.pattern, self.limit = pattern, limit
        self._tokenizer = tokenizer
        self._parts = _placed(pattern, tokenizer)
        for special in sorted(tokenizer.specials, key=len, reverse=True):
            if any(part.kind == "text" and special in part.text for part in self._parts):
                hint = "write a blank as {blank}; the tokenizer adds the others itself"
                message = f"{_named(pattern)} writes the special token {quoted(special)}"
                raise GraftError("GC179", message, hint=hint)
        empty = tokenizer.encode([self.text([""] * self.slots)[0]])[0]
        fixed = len(tokenizer.ids(empty))
        if fixed >= limit:
            message = f"{_named(pattern)} has {fixed} tokens without a row, of at most {limit}"
            raise GraftError("GC179", message)

    @property
    def slots(self) -> int:
        """How many slots it has; one field may fill several."""
        return sum(part.kind == "slot" for part in self._parts)

    @property
    def before(self) -> str:
        """What stands before its first blank: the end of a text, or anything for a slot."""
        first = next(index for index, part in enumerate(self.pattern.parts) if part.kind == "blank")
        if first == 0:
            return ""
        before = self.pattern.parts[first - 1]
        return before.text if before.kind == "text" else "x"

    def text(self, values: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
        """The whole text, a `BLANK` for each blank, and where each slot's value stands in it."""
        text, spans = "", []
        waiting = iter(values)
        for part in self._parts:
            start = len(text)
            text += next(waiting) if part.kind == "slot" else BLANK if part.kind == "blank" else part.text
            if part.kind == "slot":
                spans.append((start, len(text)))
        return (text.rstrip() if self._tokenizer.kind == "last" else text), spans

    def fitted(self, values: Sequence[str], encoding: Any) -> Any:
        """The encoding of the text with values that fit: cut where it is too long, special tokens taken apart.

        Args:
            values: what fills the slots.
            encoding: of that text.
        """
        held = list(values)
        while True:
            surplus = len(self._tokenizer.ids(encoding)) - self.limit
            if (apart := self._apart(held, self._tokenizer.written_specials(encoding))) != held:
                held = apart
            elif surplus > 0:
                if not any(held):
                    raise GraftError("GC179", f"{_named(self.pattern)} has more than {self.limit} tokens without a row")
                held = self._shorter(held, encoding, surplus)
            else:
                return encoding
            encoding = self._tokenizer.encode([self.text(held)[0]])[0]

    def _apart(self, values: list[str], special: Sequence[tuple[int, int]]) -> list[str]:
        """Values with spaces between the characters of what would be special tokens."""
        _, spans = self.text(values)
        made: list[str] = []
        for value, (start, end) in zip(values, spans, strict=True):
            for first, last in sorted(special, reverse=True):
                low, high = max(first, start) - start, min(last, end) - start
                if low >= high:
                    continue
                # Alone between spaces and still special: there is no way to write it.
                alone = high - low == 1 and value[max(0, low - 1) : high + 1].strip() == value[low]
                piece = " " if alone and low > 0 and high < len(value) else f" {' '.join(value[low:high])} "
                value = value[:low] + piece + value[high:]
            made.append(value)
        return made

    def _shorter(self, values: list[str], encoding: Any, surplus: int) -> list[str]:
        """Values of fewer tokens; each call takes a character at least, as what is left may be other tokens."""
        _, spans = self.text(values)
        offsets = [offset for offset in encoding.offsets if offset[1] > offset[0]]
        inside = [[o for o in offsets if o[0] < end and o[1] > start] for start, end in spans]
        counts = [len(found) for found in inside]
        made: list[str] = []
        for value, (start, _), found, kept in zip(
            values, spans, inside, shortened_counts(counts, surplus), strict=True
        ):
            if kept == len(found) and found:
                made.append(value)
                continue
            stop = found[kept - 1][1] - start if kept else 0
            made.append(value[: min(stop, len(value) - 1)] if value else "")
        return made


def _named(pattern: PatternSpec) -> str:
    return f"the pattern {quoted(pattern.name or pattern.text)}"


def _placed(pattern: PatternSpec, tokenizer: BlankTokenizer) -> tuple[PatternPart, ...]:
    """The parts that become text."""
    parts = pattern.parts
    if tokenizer.kind == "mask":
        return parts
    if tokenizer.kind == "sentinel":
        if pattern.blanks != 1:
            message = f"{_named(pattern)} has {pattern.blanks} blanks, and such a model fills one"
            raise GraftError("GC179", message, hint="use words of one token, and one {blank}")
        return parts
    if pattern.blanks != 1 or parts[-1].kind != "blank":
        message = f"{_named(pattern)} does not end in its only blank"
        raise GraftError("GC179", message, hint='for example "{text} This text is about {blank}"')
    return parts[:-1]
