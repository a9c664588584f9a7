"""Fill a pattern's slots with the fields of a row, cut to a maximum length: only fields are cut, longest first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graftc.applications.pet.blank_tokenizer import BLANK, BlankTokenizer
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.text import quoted
from graftc.specs.pet.pattern import PatternPart, PatternSpec


def shortened_counts(counts: Sequence[int], surplus: int) -> list[int]:
    """Return how many tokens each slot keeps; each token is removed from the longest slot, or the last one if tied.

    Args:
        counts: the number of tokens in each slot.
        surplus: the number of tokens to remove; if it exceeds the total, all tokens are removed.
    """
    if surplus >= sum(counts):
        return [0] * len(counts)
    low, high = 0, max(counts, default=0)
    while low < high:  # find the highest level that removes enough
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
    """A pattern that is ready to be filled.

    Args:
        pattern: the pattern.
        tokenizer: the tokenizer that encodes it.
        limit: the maximum number of tokens in the text.

    Raises:
        GraftError: GC179 if the pattern leaves no room for a row, contains a special token, or has a blank in a place
            that the model cannot fill.
    """

    def __init__(self, pattern: PatternSpec, tokenizer: BlankTokenizer, limit: int) -> None:
        self.pattern, self.limit = pattern, limit
        self._tokenizer = tokenizer
        self._parts = _placed(pattern, tokenizer)
        for special in sorted(tokenizer.specials, key=len, reverse=True):
            if any(part.kind == "text" and special in part.text for part in self._parts):
                hint = "write blanks as {blank}; the tokenizer adds all other special tokens itself"
                message = f"{_named(pattern)} contains the special token {quoted(special)}"
                raise GraftError("GC179", message, hint=hint)
        empty = tokenizer.encode([self.text([""] * self.slots)[0]])[0]
        fixed = len(tokenizer.ids(empty))
        if fixed >= limit:
            message = f"{_named(pattern)} has {fixed} tokens even before a row is filled in, but the limit is {limit}"
            raise GraftError("GC179", message)

    @property
    def slots(self) -> int:
        """The number of slots; one field may fill several."""
        return sum(part.kind == "slot" for part in self._parts)

    @property
    def before(self) -> str:
        """The text directly before the first blank, or ``"x"`` if that is not text; empty if the blank comes first."""
        first = next(index for index, part in enumerate(self.pattern.parts) if part.kind == "blank")
        if first == 0:
            return ""
        before = self.pattern.parts[first - 1]
        return before.text if before.kind == "text" else "x"

    def text(self, values: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
        """Return the whole text, with `BLANK` for each blank, and the span of each slot's value within it."""
        text, spans = "", []
        waiting = iter(values)
        for part in self._parts:
            start = len(text)
            text += next(waiting) if part.kind == "slot" else BLANK if part.kind == "blank" else part.text
            if part.kind == "slot":
                spans.append((start, len(text)))
        return (text.rstrip() if self._tokenizer.kind == "last" else text), spans

    def fitted(self, values: Sequence[str], encoding: Any) -> Any:
        """Return the encoding of the text, after cutting values that do not fit and breaking up special tokens in them.

        Args:
            values: the values of the slots.
            encoding: the encoding of the text with the given values.
        """
        current = list(values)
        while True:
            surplus = len(self._tokenizer.ids(encoding)) - self.limit
            if (apart := self._apart(current, self._tokenizer.written_specials(encoding))) != current:
                current = apart
            elif surplus > 0:
                if not any(current):
                    raise GraftError(
                        "GC179",
                        f"{_named(self.pattern)} has more than {self.limit} tokens even before a row is filled in",
                    )
                current = self._shorter(current, encoding, surplus)
            else:
                return encoding
            encoding = self._tokenizer.encode([self.text(current)[0]])[0]

    def _apart(self, values: list[str], special: Sequence[tuple[int, int]]) -> list[str]:
        """Return the values with spaces inserted into any text that would be encoded as a special token."""
        _, spans = self.text(values)
        separated: list[str] = []
        for value, (start, end) in zip(values, spans, strict=True):
            for first, last in sorted(special, reverse=True):
                low, high = max(first, start) - start, min(last, end) - start
                if low >= high:
                    continue
                # A single character that is special even between spaces cannot be represented and is dropped.
                alone = high - low == 1 and value[max(0, low - 1) : high + 1].strip() == value[low]
                piece = " " if alone and low > 0 and high < len(value) else f" {' '.join(value[low:high])} "
                value = value[:low] + piece + value[high:]
            separated.append(value)
        return separated

    def _shorter(self, values: list[str], encoding: Any, surplus: int) -> list[str]:
        """Return values with fewer tokens.

        Each call removes at least one character, since a shortened text may be encoded as different tokens.
        """
        _, spans = self.text(values)
        offsets = [offset for offset in encoding.offsets if offset[1] > offset[0]]
        inside = [[o for o in offsets if o[0] < end and o[1] > start] for start, end in spans]
        counts = [len(tokens) for tokens in inside]
        shortened: list[str] = []
        for value, (start, _), tokens, kept in zip(
            values, spans, inside, shortened_counts(counts, surplus), strict=True
        ):
            if kept == len(tokens) and tokens:
                shortened.append(value)
                continue
            stop = tokens[kept - 1][1] - start if kept else 0
            shortened.append(value[: min(stop, len(value) - 1)] if value else "")
        return shortened


def _named(pattern: PatternSpec) -> str:
    return f"the pattern {quoted(pattern.name or pattern.text)}"


def _placed(pattern: PatternSpec, tokenizer: BlankTokenizer) -> tuple[PatternPart, ...]:
    """Return the parts that become text, after checking that the model can fill blanks where the pattern has them."""
    parts = pattern.parts
    if tokenizer.kind == "mask":
        return parts
    if tokenizer.kind == "sentinel":
        if pattern.blanks != 1:
            message = f"{_named(pattern)} has {pattern.blanks} blanks, but the model fills only one"
            raise GraftError("GC179", message, hint="use words of one token, and a single {blank}")
        return parts
    if pattern.blanks != 1 or parts[-1].kind != "blank":
        message = f"{_named(pattern)} does not end in its only blank"
        raise GraftError("GC179", message, hint='for example "{text} This text is about {blank}"')
    return parts[:-1]
