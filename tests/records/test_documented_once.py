"""Every field of a record is documented once: by the text below it, or by its type if several records have it."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, get_args, get_type_hints

import pytest
from pydantic import Field
from pydantic.fields import FieldInfo

import graftc.cli.commands
import graftc.records
import graftc.records.applications
from graftc.records.fields import Layer
from graftc.specs.records.record import Record


def subclasses(cls: type[Record]) -> Iterator[type[Record]]:
    for each in cls.__subclasses__():
        yield each
        yield from subclasses(each)


@pytest.fixture(scope="module")
def records() -> list[type[Record]]:
    for package in (graftc.records, graftc.records.applications, graftc.cli.commands):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    return sorted({*subclasses(Record)} - LOCAL, key=lambda cls: cls.__qualname__)


def documentation(cls: type[Record]) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield every field that a class adds, with the texts that document it: those of its type, and that below it."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    hints = get_type_hints(cls, include_extras=True)
    for field, text in pairwise([*body, None]):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and "ClassVar" not in ast.dump(field)
        ):
            name = field.target.id
            marks = get_args(hints[name])[1:] if hasattr(hints[name], "__metadata__") else ()
            described = [mark.description for mark in marks if isinstance(mark, FieldInfo) and mark.description]
            below = [ast.literal_eval(text.value)] if isinstance(text, ast.Expr) else []
            yield name, described, [" ".join(inspect.cleandoc(each).split()) for each in below]


def written_twice(classes: Iterable[type[Record]]) -> dict[tuple[str, str], list[str]]:
    """Return the texts of fields of one name that are written in several places: below a field, or in a type."""
    below: dict[tuple[str, str], list[str]] = defaultdict(list)
    of_types: dict[tuple[str, str], set[str]] = defaultdict(set)
    for cls in classes:
        for name, described, own in documentation(cls):
            for text in described:
                of_types[name, text].add("a type")
            for text in own:
                below[name, text].append(cls.__qualname__)
    return {key: every for key, names in below.items() if len(every := [*names, *of_types[key]]) > 1}


def test_every_field_has_one_text(records: list[type[Record]]) -> None:
    assert len(records) > 80
    odd = {
        f"{cls.__name__}.{name}": [*types, *below]
        for cls in records
        for name, types, below in documentation(cls)
        if len(types) + len(below) != 1
    }
    assert odd == {}


def test_no_text_is_written_twice(records: list[type[Record]]) -> None:
    assert written_twice(records) == {}


@dataclass(frozen=True)
class One(Record):
    """A record."""

    place: str
    """Where it is."""

    layer: Layer

    depth: Annotated[int, Field(description="How deep it is.")]


@dataclass(frozen=True)
class Other(Record):
    """Another record."""

    place: str
    """Where it is."""

    layer: Layer
    """A second text."""

    number: int

    depth: int
    """How deep it is."""


LOCAL: set[Any] = {One, Other}


def test_planted_texts_are_seen() -> None:
    twice = {("place", "Where it is."): ["One", "Other"], ("depth", "How deep it is."): ["Other", "a type"]}
    assert written_twice([One, Other]) == twice
    counts = {name: len(types) + len(below) for name, types, below in documentation(Other)}
    assert counts == {"place": 1, "layer": 2, "number": 0, "depth": 1}
