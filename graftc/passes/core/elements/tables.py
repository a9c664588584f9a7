"""Tables that layers pass to each other, such as the keys and values that later layers of Gemma 4 share.

The entries that a call adds to a table are results of the call's graph, and are copied into the caller's own table.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Mapping, Sequence
from typing import Any

from graftc.specs.errors.diagnostics import GraftError

Table = UserDict[str, Any]


def is_table(value: Any) -> bool:
    """Return whether a value is a `UserDict` with string keys; a plain dict counts as a container of arguments."""
    return isinstance(value, UserDict) and all(isinstance(key, str) for key in value)


def tables_among(*values: Any) -> list[Table]:
    """Return the tables among arguments, including those nested in containers, in order."""
    tables: list[Table] = []
    for value in values:
        if is_table(value):
            tables.append(value)
        elif isinstance(value, list | tuple):
            tables += tables_among(*value)
        elif isinstance(value, dict):
            tables += tables_among(*value.values())
    return tables


def contents(tables: Sequence[Table]) -> list[dict[str, Any]]:
    """Return a copy of each table's entries."""
    return [dict(table) for table in tables]


def put_since(tables: Sequence[Table], before: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the entries added to tables, or replaced, since ``before``, by the table's index and the entry's key.

    Raises:
        GraftError: GC030 if an entry was removed.
    """
    entries: dict[str, Any] = {}
    for number, (table, old) in enumerate(zip(tables, before, strict=True)):
        if not old.keys() <= table.keys():
            raise GraftError("GC030", "a layer removes an entry from a table that was passed to it")
        entries |= {f"{number} {key}": value for key, value in table.items() if old.get(key) is not value}
    return entries


def put_into(tables: Sequence[Table], returned: Mapping[str, Any]) -> None:
    """Write the entries that `put_since` returned into tables."""
    for name, value in returned.items():
        number, _, key = name.partition(" ")
        tables[int(number)][key] = value
