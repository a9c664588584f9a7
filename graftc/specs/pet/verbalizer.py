"""Verbalizers: the words that represent labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.text import quoted, shown
from graftc.specs.limits import LABELS, WORDS
from graftc.specs.source import format_path
from graftc.specs.spec_errors import Problem, reject


class Verbalizer(Mapping[str, tuple[str, ...]]):
    """The words of each label, in order; frozen and hashable.

    Args:
        words: a word, or a list of words, for each label. Two labels may share some of their words, but not all.

    Raises:
        GraftError: GC002 for values that are not strings, GC176 for labels that it cannot distinguish, or that have no
            words.
    """

    __slots__ = ("_words",)

    def __init__(self, words: Mapping[str, str | Sequence[str]]) -> None:
        for path, error in _problems(words):
            raise error.within(format_path(path))
        self._words = {label: _listed(own) for label, own in words.items()}

    def __getitem__(self, label: str) -> tuple[str, ...]:
        return self._words[label]

    def __iter__(self) -> Iterator[str]:
        return iter(self._words)

    def __len__(self) -> int:
        return len(self._words)

    def __hash__(self) -> int:
        return hash(tuple(self._words.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Verbalizer) and list(self._words.items()) == list(other._words.items())

    def __repr__(self) -> str:
        return f"Verbalizer({self._words!r})"

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of logits."""
        return tuple(self._words)

    def ordered(self, labels: Sequence[str]) -> Verbalizer:
        """Return the same words with the labels in another order."""
        return Verbalizer({label: self._words[label] for label in labels})

    def to_plain(self) -> dict[str, str | list[str]]:
        """Return the words as a document contains them."""
        return {label: own[0] if len(own) == 1 else list(own) for label, own in self._words.items()}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        written = core_schema.plain_serializer_function_ser_schema(cls.to_plain)
        return core_schema.no_info_plain_validator_function(_validated, serialization=written)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        word = {"type": "string", "pattern": r"^\S(.*\S)?$"}
        several = {"type": "array", "items": word, "minItems": 1, "maxItems": WORDS, "uniqueItems": True}
        words = {"anyOf": [word, several]}
        return {"type": "object", "minProperties": 2, "maxProperties": LABELS, "additionalProperties": words}


def _validated(value: Any) -> Verbalizer:
    if isinstance(value, Verbalizer):
        return value
    reject(_problems(value))
    return Verbalizer(value)


def _listed(words: str | Sequence[str]) -> tuple[str, ...]:
    return (words,) if isinstance(words, str) else tuple(words)


def _problems(value: Any) -> Iterator[Problem]:
    """Yield each problem with its path."""
    if not isinstance(value, Mapping):
        yield (), GraftError("GC002", f"a verbalizer must be a mapping from labels to words, not {shown(value)}")
        return
    if len(value) < 2:
        what = "no labels" if not value else f"one label, {quoted(str(next(iter(value))))}"
        hint = "list every label that rows may have, at least two"
        yield (), GraftError("GC176", f"the verbalizer has {what}", hint=hint)
    if len(value) > LABELS:
        yield (), GraftError("GC176", f"the verbalizer has {len(value):,} labels, more than {LABELS:,}")
        return
    told: dict[frozenset[str], str] = {}
    for label, words in value.items():
        wrong = list(_label_problems(label, words))
        yield from wrong
        if wrong:
            continue
        other = told.setdefault(frozenset(_listed(words)), label)
        if other != label:
            message = f"the labels {quoted(other)} and {quoted(label)} have the same words"
            yield (label,), GraftError("GC176", message, hint="use different words for one of them")


def _label_problems(label: Any, words: Any) -> Iterator[Problem]:
    if not isinstance(label, str):
        hint = "labels are strings: put them in quotes"
        yield (), GraftError("GC002", f"a label must be a string, not {shown(label)}", hint=hint)
        return
    if not label:
        yield (label,), GraftError("GC176", "a label is empty", hint="write labels as in the data")
    elif label != label.strip():
        hint = "write labels as in the data"
        yield (label,), GraftError("GC176", f"the label {quoted(label)} begins or ends with a space", hint=hint)
    if not isinstance(words, str | list | tuple):
        yield (label,), _no_text(words)
        return
    listed = [words] if isinstance(words, str) else list(words)
    if not 1 <= len(listed) <= WORDS:
        message = f"the label {quoted(label)} has {len(listed) or 'no'} words"
        yield (label,), GraftError("GC176", message, hint=f"give it a word, or a list of at most {WORDS}")
        return
    for index, word in enumerate(listed):
        path = (label,) if isinstance(words, str) else (label, index)
        if not isinstance(word, str):
            yield path, _no_text(word)
        elif not word.strip():
            yield path, GraftError("GC176", "the word is empty", hint="write a word, or remove it")
        elif word != word.strip():
            fix = (word, word.strip())
            hint = "put spaces in the pattern: '... {blank}'"
            yield path, GraftError("GC176", f"the word {quoted(word)} begins or ends with a space", hint=hint, fix=fix)
        elif word in listed[:index]:
            yield path, GraftError("GC176", f"the word {quoted(word)} is listed twice", hint="remove it")


def _no_text(word: Any) -> GraftError:
    simple = isinstance(word, bool | int | float)
    hint = f'did you mean "{shown(word)}"?' if simple else "use a word, or a list of words"
    fix = (shown(word), f'"{shown(word)}"') if simple else None
    return GraftError("GC002", f"a word must be a string, not {shown(word)}", hint=hint, fix=fix)
