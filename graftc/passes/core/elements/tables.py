"""Tables that layers hand each other, such as the keys and values that later layers of Gemma 4 share: what a call puts
into one comes out of its graph as results, and goes into the caller's own table."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Mapping, Sequence
from typing import Any

from graftc.specs.errors.diagnostics import GraftError

Table = UserDict[str, Any]


def is_table(value: Any) -> bool:
    """Whether a value is a `UserDict` with texts as keys; a plain dict is a container of arguments."""
    return isinstance(value, UserDict) and all(isinstance(key, str) for key in value)


def tables_among(*values: Any) -> list[Table]:
    """Return the tables among arguments and in containers of these, in order."""
    found: list[Table] = []
    for value in values:
        if is_table(value):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tables_among(*value)
        elif isinstance(value, dict):
            found += tables_among(*value.values())
    return found


def contents(tables: Sequence[Table]) -> list[dict[str, Any]]:
    """Copy the entries of tables."""
    return [dict(table) for table in tables]


def put_since(tables: Sequence[Table], before: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the entries put into tables since `contents`, by the number of the table and the key.

    Raises:
        GraftError: GC030, something was taken out.
    """
    found: dict[str, Any] = {}
    for number, (table, held) in enumerate(zip(tables, before, strict=True)):
        if not held.keys() <= table.keys():
            raise GraftError("GC030", "a layer takes something out of a table that it is called with")
        found |= {f"{number} {key}": value for key, value in table.items() if held.get(key) is not value}
    return found


def put_into(tables: Sequence[Table], made: Mapping[str, Any]) -> None:
    """Put what a graph has given for `put_since` into tables."""
    for name, value in made.items():
        number, _, key = name.partition(" ")
        tables[int(number)][key] = value
