"""Encode rows as batches of cloze questions: put the rows into patterns, and tokenize the resulting texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graftc.applications.pet.blank_tokenizer import BLANK, BlankKind, BlankTokenizer
from graftc.applications.pet.truncation import FilledPattern
from graftc.specs.errors.diagnostics import GraftError, Place, nearest
from graftc.specs.errors.text import quoted, shown, some
from graftc.specs.pet.document import PetSpec
from graftc.specs.pet.pattern import PatternSpec
from graftc.specs.pet.verbalizer import Verbalizer
from graftc.specs.source import format_path

MASKED = 0.15
"""The share of tokens in the auxiliary loss; of every 10, 8 are masked, 1 is replaced and 1 is left unchanged."""

IGNORED = -100
"""The label of a token that the loss ignores."""

_UNBOUNDED = 1_000_000
"""If a tokenizer's maximum length is at least this value, its limit is unknown."""


class ClozeEncoder:
    """Encoder that turns rows into cloze questions (Schick & Schütze 2021).

    The row's fields are put into the pattern, and the tokenizer encodes the resulting text. If it is too long, fields
    are cut at their ends, the longest first; the pattern itself is never cut. Special tokens written out in a field are
    treated as ordinary text.

    Args:
        patterns: the patterns, whose slots name the fields of rows.
        verbalizers: the verbalizer of each pattern, all with the same labels in the same order.
        tokenizer: the model's transformers tokenizer.
        max_length: the maximum number of tokens in a text.
        blank: the kind of blank; by default as `BlankTokenizer` determines it.
        positions: the maximum number of tokens that the model takes, if it has such a limit.
        start: the first token of the decoder, used if the blank is a sentinel; by default the padding token, as in T5.

    Raises:
        GraftError: GC178 if a word does not fill the blanks; GC179 if a pattern does not fit the tokenizer or the
            maximum length.
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
        limit = int(tokenizer.model_max_length)
        bounds = [max_length, limit if limit < _UNBOUNDED else None, positions]
        self.max_length = min(bound for bound in bounds if bound is not None)
        """The maximum number of tokens in a text."""
        self.patterns, self.verbalizers = tuple(patterns), tuple(verbalizers)
        self.labels = self.verbalizers[0].labels
        """The labels, in the order of the logits."""
        self._blanks = BlankTokenizer(tokenizer, blank)
        self._filled = tuple(self._fillable(number) for number in range(len(self.patterns)))
        self._words = tuple(self._words_of(number, each) for number, each in enumerate(self.verbalizers))
        self._start = self._blanks.pad_id if start is None else start

    @classmethod
    def of(cls, spec: PetSpec, tokenizer: Any, max_length: int | None = None, **options: Any) -> ClozeEncoder:
        """Build the encoder for a PET spec.

        Args:
            spec: the spec with the patterns and verbalizers.
            tokenizer: the model's tokenizer.
            max_length: the maximum number of tokens in a text; by default the spec's limit for training members.
            options: further keyword arguments of the class.
        """
        length = spec.training.max_length if max_length is None else max_length
        return cls(spec.patterns, spec.verbalizers, tokenizer, length, **options)

    @property
    def kind(self) -> BlankKind:
        """The kind of blank."""
        return self._blanks.kind

    @property
    def has_token_loss(self) -> bool:
        """Whether the model has an auxiliary loss; a decoder that generates after a sentinel has none."""
        return self.kind != "sentinel"

    def options(self, indices: Sequence[int] | None = None) -> dict[str, Any]:
        """Return the `cloze` section of a graftc document.

        If the section has several verbalizers, they correspond to the given patterns, in order, and a row's `pattern`
        input is an index into them. If all verbalizers have the same tokens, the section has only one verbalizer.

        Args:
            indices: the indices of the patterns that the model must answer; by default all.
        """
        chosen = [self._words[i] for i in (range(len(self.patterns)) if indices is None else indices)]
        if all(words == chosen[0] for words in chosen):
            chosen = chosen[:1]
        written = [[[list(word) for word in words[label]] for label in self.labels] for words in chosen]
        section: dict[str, Any] = {"labels": list(self.labels), "verbalizers": written}
        if self.kind == "mask":
            section["blank"] = self._blanks.blank_id
        if self.kind == "last":
            section["blank"] = "last"
        if self.kind == "sentinel":
            section["decoder"] = [self._start, self._blanks.blank_id]
        return section

    def check(self, rows: Sequence[Mapping[str, str]]) -> None:
        """Check that rows have the fields that patterns use.

        Raises:
            GraftError: GC180 for the first row that lacks a field; rows are counted from 1.
        """
        for number, row in enumerate(rows):
            for filled in self._filled:
                _values(filled.pattern, row, number)

    def encode(self, rows: Sequence[Mapping[str, str]], pattern: int | Sequence[int]) -> dict[str, Tensor]:
        """Return a batch of rows in their patterns.

        Args:
            rows: the fields of each row.
            pattern: the index of the pattern, or one index for each row.

        Returns:
            ``input_ids`` and ``attention_mask``, int64 ``[rows, longest]``, padded on the right; ``token_type_ids`` if
            the model takes them.

        Raises:
            GraftError: GC180 if a row lacks a field or yields no tokens.
        """
        if not rows:
            raise ValueError("a batch needs at least one row")
        numbers = [pattern] * len(rows) if isinstance(pattern, int) else list(pattern)
        filled = [self._filled[number] for number in numbers]
        values = [_values(question.pattern, row, i) for i, (question, row) in enumerate(zip(filled, rows, strict=True))]
        texts = [question.text(fields)[0] for question, fields in zip(filled, values, strict=True)]
        sequences: list[tuple[list[int], list[int]]] = []
        encoded = zip(filled, values, self._blanks.encode(texts), strict=True)
        for number, (question, fields, encoding) in enumerate(encoded, start=1):
            fitting = question.fitted(fields, encoding)
            ids = self._blanks.ids(fitting)
            if not ids:
                message = f"row {number} yields no tokens in the pattern {quoted(str(question.pattern.name))}"
                raise GraftError("GC180", message, hint="its fields are empty, and so is the pattern without them")
            sequences.append((ids, list(fitting.type_ids[: len(ids)])))
        width = max(len(ids) for ids, _ in sequences)
        batch = {
            "input_ids": _padded([ids for ids, _ in sequences], width, self._blanks.pad_id),
            "attention_mask": _padded([[1] * len(ids) for ids, _ in sequences], width, 0),
        }
        if self._blanks.types:
            pad = int(self._blanks.tokenizer.pad_token_type_id)
            batch["token_type_ids"] = _padded([types for _, types in sequences], width, pad)
        return batch

    def token_batch(
        self, rows: Sequence[Mapping[str, str]], pattern: int | Sequence[int], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Return a batch for the auxiliary loss: as for :meth:`encode`, with int64 ``token_targets[rows, longest]``.

        For a model with a mask token, the loss covers 15 % of the tokens, and at least one token of the batch. Of every
        10 such tokens, 8 are masked, one is replaced by another token and one is left unchanged. Blanks and special
        tokens are left as they are and are never covered. For a model that generates from left to right, the loss
        covers every token except special ones.

        Args:
            rows, pattern: as for :meth:`encode`.
            generator: a random number generator on the CPU.

        Raises:
            GraftError: GC179 if the model has no auxiliary loss; otherwise as for :meth:`encode`.
        """
        if not self.has_token_loss:
            hint = "training: {auxiliary: 0}"
            message = "a model that generates after a sentinel has no auxiliary loss"
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
        """Return the ids of all tokens that are not special."""
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
        tokens: dict[str, tuple[tuple[int, ...], ...]] = {}
        seen: dict[frozenset[tuple[int, ...]], str] = {}
        for label, words in verbalizer.items():
            path = format_path((*around, "verbalizer", label))
            paths = [f"{path}[{index}]" for index in range(len(words))] if len(words) > 1 else [path]
            tokens[label] = tuple(
                self._word(filled, word, word_path) for word, word_path in zip(words, paths, strict=True)
            )
            other = seen.setdefault(frozenset(tokens[label]), label)
            if other != label:
                message = f"the words of {quoted(other)} and {quoted(label)} are the same tokens"
                hint = "use other words; the tokenizer may not distinguish upper and lower case"
                raise GraftError("GC178", message, place=Place(path=path), hint=hint)
        return tokens

    def _word(self, filled: FilledPattern, word: str, path: str) -> tuple[int, ...]:
        """Return the tokens of a word, one for each blank; ``path`` is the word's location in the document."""
        pattern, blanks = filled.pattern, self._blanks
        ids = blanks.word_ids(word, filled.before)
        if len(ids) == pattern.blanks and blanks.knows(ids):
            return tuple(ids)
        where = f"{pattern.blanks} blank{'s' if pattern.blanks != 1 else ''} of {quoted(str(pattern.name))}"
        if not blanks.knows(ids) or not ids:
            message = f"the vocabulary does not have the word {quoted(word)}"
        else:
            message = f"the word {quoted(word)} is {len(ids)} token{'s' if len(ids) != 1 else ''}, for the {where}"
            message += f": {blanks.pieces(ids)}"
        close = blanks.like(word, filled.before) if pattern.blanks == 1 else []
        hint = f"use a word of one token, such as {some([quoted(c) for c in close])}" if close else None
        raise GraftError("GC178", message, place=Place(path=path), hint=hint)


def _values(pattern: PatternSpec, row: Mapping[str, str], number: int) -> list[str]:
    """Return the values for a pattern's slots, in order, with spaces in place of the blank character."""
    values: list[str] = []
    for part in pattern.parts:
        if part.kind != "slot":
            continue
        value = row.get(part.text)
        if isinstance(value, str):
            values.append(value.replace(BLANK, " "))
            continue
        if part.text in row:
            message = f"row {number + 1} has {shown(value)} for {quoted(part.text)}, which is not text"
            raise GraftError("GC180", message)
        names = [str(name) for name in row]
        close = nearest(part.text, names, n=1)
        hint = f"did you mean {quoted(close[0])}?" if close else f"its fields are: {some(names, 20) or 'none'}"
        message = (
            f"row {number + 1} has no field {quoted(part.text)}, which the pattern {quoted(str(pattern.name))} uses"
        )
        raise GraftError("GC180", message, hint=hint)
    return values


def _padded(rows: Sequence[Sequence[int]], width: int, pad: int) -> Tensor:
    """Return the rows as int64 ``[rows, width]``, padded on the right."""
    return torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], dtype=torch.int64)
