"""Batches of cloze questions: rows in patterns, as tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graftc.runtime.pet.blanks import BLANK, BlankKind, BlankTokenizer
from graftc.runtime.pet.filling import FilledPattern
from graftc.specs.errors.diagnostics import GraftError, Place, nearest
from graftc.specs.errors.text import quoted, shown, some
from graftc.specs.pet.document import PetSpec
from graftc.specs.pet.pattern import PatternSpec
from graftc.specs.pet.verbalizer import Verbalizer
from graftc.specs.source import format_path

__all__ = ["IGNORED", "MASKED", "ClozeEncoder"]

MASKED = 0.15
"""Share of tokens that the auxiliary loss is about; 8 in 10 of them masked, 1 replaced by another, 1 left."""

IGNORED = -100
"""The label of a token that does not count."""

_UNBOUNDED = 1_000_000
"""From here on a tokenizer's largest length means that it does not know one."""


class ClozeEncoder:
    """Rows as cloze questions (Schick & Schütze 2021).

    What it makes is what the tokenizer makes of the pattern with the row's fields in it. Where that is too long, fields
    are cut at their ends, the longest first, and the pattern never. Special tokens written out in a field are text.

    Args:
        patterns: the patterns, their fields to be found in rows.
        verbalizers: of each pattern, with the same labels in the same order.
        tokenizer: the model's, of transformers.
        max_length: tokens of a text at most.
        blank: what a blank is; by default as `BlankTokenizer` finds.
        positions: tokens that the model takes at most, if it has such a bound.
        start: the token with which a decoder starts, for `sentinel`; by default that of padding, as in T5.

    Raises:
        GraftError: GC178, a word does not fill the blanks; GC179, a pattern does not fit tokenizer or length.
    """

    def __init__(
        self,
        patterns: Sequence[PatternSpec],
        verbalizers: Sequence[Verbalizer],
        tokenizer: Any,
        max_length: int = 256,
        *,
        blank: BlankKind | None = None,
        positions: int | None = None,
        start: int | None = None,
    ) -> None:
        own = int(tokenizer.model_max_length)
        bounds = [max_length, own if own < _UNBOUNDED else None, positions]
        self.max_length = min(bound for bound in bounds if bound is not None)
        """Tokens of a text at most."""
        self.patterns, self.verbalizers = tuple(patterns), tuple(verbalizers)
        self.labels = self.verbalizers[0].labels
        """The labels, in the order of logits."""
        self._blanks = BlankTokenizer(tokenizer, blank)
        self._filled = tuple(self._fillable(number) for number in range(len(self.patterns)))
        self._words = tuple(self._words_of(number, own) for number, own in enumerate(self.verbalizers))
        self._start = self._blanks.pad_id if start is None else start

    @classmethod
    def of(cls, spec: PetSpec, tokenizer: Any, max_length: int | None = None, **options: Any) -> ClozeEncoder:
        """The encoder of a PET spec.

        Args:
            spec: its patterns and verbalizers.
            tokenizer: the model's.
            max_length: by default that of members' training.
            options: as for the class.
        """
        length = spec.training.max_length if max_length is None else max_length
        return cls(spec.patterns, spec.verbalizers, tokenizer, length, **options)

    @property
    def kind(self) -> BlankKind:
        """What a blank is."""
        return self._blanks.kind

    @property
    def has_token_loss(self) -> bool:
        """Whether there is an auxiliary loss: not where a decoder writes behind a sentinel."""
        return self.kind != "sentinel"

    def options(self, indices: Sequence[int] | None = None) -> dict[str, Any]:
        """The `cloze` of a graftc document.

        Where it has several verbalizers, they are those of the patterns in this order, and a row's `pattern` is a place
        in it. It has one where the tokens of all are the same.

        Args:
            indices: patterns that the model is for, by number; by default all.
        """
        chosen = [self._words[i] for i in (range(len(self.patterns)) if indices is None else indices)]
        if all(words == chosen[0] for words in chosen):
            chosen = chosen[:1]
        written = [[[list(word) for word in own[label]] for label in self.labels] for own in chosen]
        made: dict[str, Any] = {"labels": list(self.labels), "verbalizers": written}
        if self.kind == "mask":
            made["blank"] = self._blanks.blank_id
        if self.kind == "last":
            made["blank"] = "last"
        if self.kind == "sentinel":
            made["decoder"] = [self._start, self._blanks.blank_id]
        return made

    def check(self, rows: Sequence[Mapping[str, str]]) -> None:
        """Check that rows have the fields that patterns show.

        Raises:
            GraftError: GC180 with the number of the row, from 1.
        """
        for number, row in enumerate(rows):
            for filled in self._filled:
                _values(filled.pattern, row, number)

    def encode(self, rows: Sequence[Mapping[str, str]], pattern: int | Sequence[int]) -> dict[str, Tensor]:
        """A batch of rows in their patterns.

        Args:
            rows: their fields.
            pattern: number of the pattern, or one for each row.

        Returns:
            ``input_ids`` and ``attention_mask``, int64 ``[rows, longest]``, padded on the right; ``token_type_ids``
            where the model takes them.

        Raises:
            GraftError: GC180, a row lacks a field, or makes no token.
        """
        if not rows:
            raise ValueError("a batch has a row at least")
        numbers = [pattern] * len(rows) if isinstance(pattern, int) else list(pattern)
        filled = [self._filled[number] for number in numbers]
        values = [_values(own.pattern, row, i) for i, (own, row) in enumerate(zip(filled, rows, strict=True))]
        texts = [own.text(held)[0] for own, held in zip(filled, values, strict=True)]
        made: list[tuple[list[int], list[int]]] = []
        encoded = zip(filled, values, self._blanks.encode(texts), strict=True)
        for number, (own, held, encoding) in enumerate(encoded, start=1):
            fitting = own.fitted(held, encoding)
            ids = self._blanks.ids(fitting)
            if not ids:
                message = f"row {number} makes no token in the pattern {quoted(str(own.pattern.name))}"
                raise GraftError("GC180", message, hint="its fields are empty, and so is the pattern without them")
            made.append((ids, list(fitting.type_ids[: len(ids)])))
        width = max(len(ids) for ids, _ in made)
        batch = {
            "input_ids": _padded([ids for ids, _ in made], width, self._blanks.pad_id),
            "attention_mask": _padded([[1] * len(ids) for ids, _ in made], width, 0),
        }
        if self._blanks.types:
            pad = int(self._blanks.tokenizer.pad_token_type_id)
            batch["token_type_ids"] = _padded([types for _, types in made], width, pad)
        return batch

    def token_batch(
        self, rows: Sequence[Mapping[str, str]], pattern: int | Sequence[int], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """A batch for the auxiliary loss: as :meth:`encode`, and ``token_targets``, int64 ``[rows, longest]``.

        Of a model with masks 15 % of the tokens count, a token of the batch at least; 8 in 10 of them are masked, one
        is replaced by another token and one is left. Blanks stay blanks and do not count, nor do special tokens. Of a
        model that writes from left to right every token counts.

        Args:
            rows, pattern: as for :meth:`encode`.
            generator: of random numbers, on the CPU.

        Raises:
            GraftError: GC179, such a model has no auxiliary loss; as :meth:`encode`.
        """
        if not self.has_token_loss:
            hint = "training: {auxiliary: 0}"
            message = "a model that writes behind a sentinel has no auxiliary loss"
            raise GraftError("GC179", message, place=Place(path="training.auxiliary"), hint=hint)
        batch = self.encode(rows, pattern)
        ids = batch["input_ids"]
        special = torch.tensor(sorted(self._blanks.special_ids), dtype=torch.int64)
        counts = batch["attention_mask"].bool() & ~torch.isin(ids, special)
        if self.kind == "last":
            return {**batch, "token_targets": ids.masked_fill(~counts, IGNORED)}
        drawn = torch.rand(ids.shape, generator=generator)
        chosen = counts & (drawn < MASKED)
        if counts.any() and not chosen.any():
            chosen = counts & (drawn == drawn[counts].min())
        kinds = torch.rand(ids.shape, generator=generator)
        plain = self._plain_ids()
        others = plain[torch.randint(len(plain), ids.shape, generator=generator)]
        assert self._blanks.blank_id is not None
        changed = ids.masked_fill(chosen & (kinds < 0.8), self._blanks.blank_id)
        changed = torch.where(chosen & (kinds >= 0.8) & (kinds < 0.9), others, changed)
        return {**batch, "input_ids": changed, "token_targets": ids.masked_fill(~chosen, IGNORED)}

    def _plain_ids(self) -> Tensor:
        """The tokens that are not special ones."""
        known = set(self._blanks.tokenizer.get_vocab().values()) - self._blanks.special_ids
        return torch.tensor(sorted(known), dtype=torch.int64)

    def _fillable(self, number: int) -> FilledPattern:
        try:
            return FilledPattern(self.patterns[number], self._blanks, self.max_length)
        except GraftError as error:
            raise error.within(f"patterns[{number}]") from error

    def _words_of(self, number: int, verbalizer: Verbalizer) -> dict[str, tuple[tuple[int, ...], ...]]:
        filled = self._filled[number]
        around = ("patterns", number) if filled.pattern.verbalizer is not None else ()
        found: dict[str, tuple[tuple[int, ...], ...]] = {}
        told: dict[frozenset[tuple[int, ...]], str] = {}
        for label, words in verbalizer.items():
            path = format_path((*around, "verbalizer", label))
            paths = [f"{path}[{index}]" for index in range(len(words))] if len(words) > 1 else [path]
            found[label] = tuple(self._word(filled, word, own) for word, own in zip(words, paths, strict=True))
            other = told.setdefault(frozenset(found[label]), label)
            if other != label:
                message = f"the words of {quoted(other)} and {quoted(label)} are the same tokens"
                hint = "the tokenizer may not tell capitals apart; use other words"
                raise GraftError("GC178", message, place=Place(path=path), hint=hint)
        return found

    def _word(self, filled: FilledPattern, word: str, path: str) -> tuple[int, ...]:
        """The tokens of a word, one for each blank; ``path`` is where it stands in a document."""
        pattern, blanks = filled.pattern, self._blanks
        ids = blanks.word_ids(word, filled.before)
        if len(ids) == pattern.blanks and blanks.knows(ids):
            return tuple(ids)
        where = f"{pattern.blanks} blank{'s' if pattern.blanks != 1 else ''} of {quoted(str(pattern.name))}"
        if not blanks.knows(ids) or not ids:
            said = f"the vocabulary does not have the word {quoted(word)}"
        else:
            said = f"the word {quoted(word)} is {len(ids)} token{'s' if len(ids) != 1 else ''}, for the {where}"
            said += f": {blanks.pieces(ids)}"
        close = blanks.like(word, filled.before) if pattern.blanks == 1 else []
        hint = f"words of one token are {some([quoted(c) for c in close])}" if close else None
        raise GraftError("GC178", said, place=Place(path=path), hint=hint)


def _values(pattern: PatternSpec, row: Mapping[str, str], number: int) -> list[str]:
    """What fills the slots of a pattern, in order; without the character that stands for a blank."""
    made: list[str] = []
    for part in pattern.parts:
        if part.kind != "slot":
            continue
        value = row.get(part.text)
        if isinstance(value, str):
            made.append(value.replace(BLANK, " "))
            continue
        if part.text in row:
            message = f"row {number + 1} has {shown(value)} for {quoted(part.text)}, which is not text"
            raise GraftError("GC180", message)
        names = [str(name) for name in row]
        close = nearest(part.text, names, n=1)
        hint = f"did you mean {quoted(close[0])}?" if close else f"its fields are: {some(names, 20) or 'none'}"
        message = (
            f"row {number + 1} has no field {quoted(part.text)}, which the pattern {quoted(str(pattern.name))} shows"
        )
        raise GraftError("GC180", message, hint=hint)
    return made


def _padded(rows: Sequence[Sequence[int]], width: int, pad: int) -> Tensor:
    """int64 ``[rows, width]``, padded on the right."""
    return torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], dtype=torch.int64)
