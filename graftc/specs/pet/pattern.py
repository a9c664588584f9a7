"""Patterns: texts with slots for a row's fields and blanks that a language model fills."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import groupby
from operator import attrgetter
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

from pydantic import BeforeValidator, Field, field_validator

from graftc.specs.base_model import SpecModel
from graftc.specs.errors.diagnostics import GraftError, nearest
from graftc.specs.errors.text import quoted
from graftc.specs.limits import NAME
from graftc.specs.pet.verbalizer import Verbalizer
from graftc.specs.spec_errors import refuse

BLANKS = 16
"""Maximum number of blanks in a pattern."""

LABEL = "label"
"""The field of a row that contains its label, which no pattern shows."""

_BLANK = "blank"
_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|[^{}]+")
_FIELD = re.compile(r"\w(?:[\w .\-]*\w)?")
_BETTER = "write a slot as {text}, a blank as {blank}, and a brace itself as {{ or }}"


class PatternPart(NamedTuple):
    """A piece of a pattern."""

    kind: Literal["text", "slot", "blank"]
    """A `text` is literal, a `slot` is filled with a field of the row, and a `blank` is filled by the model."""

    text: str
    """The text itself, the name of the field, or nothing."""


def parse_pattern(text: str) -> tuple[PatternPart, ...]:
    """Return the parts of a pattern, in order; adjacent texts are joined.

    Raises:
        GraftError: GC175 if it has no blank, no slot, more than 16 blanks, or braces that are neither a slot nor a
            blank.
    """
    parts: list[PatternPart] = []
    for kind, same in groupby(_pieces(text), key=attrgetter("kind")):
        pieces = list(same)
        parts += [PatternPart("text", "".join(piece.text for piece in pieces))] if kind == "text" else pieces
    slots = [part.text for part in parts if part.kind == "slot"]
    blanks = sum(part.kind == "blank" for part in parts)
    if not blanks:
        close = [name for name in slots if name.lower() == "mask" or nearest(name, [_BLANK])]
        fix = (f"{{{close[0]}}}", "{blank}") if close else None
        hint = "did you mean {blank}?" if close else "write {blank} where the model is to fill in a word"
        raise GraftError("GC175", f"the pattern {quoted(text)} has no blank", hint=hint, fix=fix)
    if not slots:
        hint = "write {text} where the field 'text' of a row belongs"
        raise GraftError("GC175", f"the pattern {quoted(text)} has no slot for a field of a row", hint=hint)
    if blanks > BLANKS:
        raise GraftError("GC175", f"the pattern has {blanks} blanks, more than {BLANKS}")
    return tuple(parts)


def _pieces(text: str) -> Iterator[PatternPart]:
    for match in _PIECE.finditer(text):
        piece, name = match.group(), match.group(1)
        if piece in ("{{", "}}"):
            yield PatternPart("text", piece[0])
        elif name is not None:
            yield PatternPart("blank", "") if name == _BLANK else PatternPart("slot", _field(name))
        elif piece in ("{", "}"):
            other = "}" if piece == "{" else "{"
            message = f"a brace at character {match.start() + 1} has no '{other}'"
            raise GraftError("GC175", f"{message}: {quoted(text)}", hint=_BETTER)
        else:
            yield PatternPart("text", piece)


def _field(name: str) -> str:
    """Return the name of a slot, after checking it."""
    if name.strip().lower() == _BLANK:
        fix = (f"{{{name}}}", "{blank}")
        raise GraftError("GC175", f"{{{name}}} is neither a slot nor a blank", hint="did you mean {blank}?", fix=fix)
    if name == LABEL:
        hint = "the blank represents it; name another field of the rows"
        raise GraftError("GC175", "a pattern cannot show the label", hint=hint)
    if not _FIELD.fullmatch(name):
        message = f"{quoted('{' + name + '}')} names no field of a row" if name else "'{}' names no field of a row"
        raise GraftError("GC175", message, hint=_BETTER)
    return name


class PatternSpec(SpecModel):
    """A pattern, and the words of its own if it has any: a pattern-verbalizer pair (Schick & Schütze 2021, Exploiting
    Cloze Questions for Few Shot Text Classification and Natural Language Inference).
    """

    name: str | None = Field(default=None, min_length=1, max_length=NAME)
    """Unique name, which results and folders carry. Default: `pattern-1`, `pattern-2`, ..."""

    text: str
    """The text, for example `"{text} This text is about {blank}."`. `{blank}` is what the model fills, several of them
    are several tokens; other names in braces are fields of the data's rows. A brace itself is written twice."""

    verbalizer: Verbalizer | None = None
    """The words of this pattern for each label. Default: those of the whole document."""

    @field_validator("name")
    @classmethod
    def _name_is_usable(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"\w[\w.\-]*", name, flags=re.ASCII):
            better = re.sub(r"[^\w.\-]+", "-", name, flags=re.ASCII).strip("-.")
            message = f"name {quoted(name)} must be letters, digits, '_', '.' and '-', as it names a folder"
            fix = (name, better) if better else None
            refuse((), message, hint=f"for example '{better}'" if better else None, fix=fix)
        return name

    @field_validator("text")
    @classmethod
    def _text_has_a_blank(cls, text: str) -> str:
        try:
            parse_pattern(text)
        except GraftError as error:
            refuse((), error)
        return text

    @cached_property
    def parts(self) -> tuple[PatternPart, ...]:
        """The parts of the text, in order."""
        return parse_pattern(self.text)

    @property
    def slots(self) -> tuple[str, ...]:
        """The fields that the pattern shows, each once, in order."""
        return tuple(dict.fromkeys(part.text for part in self.parts if part.kind == "slot"))

    @property
    def blanks(self) -> int:
        """The number of blanks."""
        return sum(part.kind == "blank" for part in self.parts)


def _from_text(value: Any) -> Any:
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, Mapping | PatternSpec):
        refuse((), "a pattern must be a string or a mapping with text")
    return value


Pattern: TypeAlias = Annotated[PatternSpec, BeforeValidator(_from_text, json_schema_input_type=str | PatternSpec)]
"""A pattern as written in documents: its text alone, or a mapping."""
