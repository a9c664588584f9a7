"""A Program's history as JSON data: counts for each step and, separately, the nodes that it changed.

Readers that only understand counts skip the rest. A node is represented by its index if it is still in the graph, and
otherwise by its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graftc.passes.core.ir.history import Changes, ErasedNode, HistoryEntry, Reads
from graftc.passes.core.ir.printer import target_name


class HistoryError(ValueError):
    """Raised for data that is not a history."""


def history_to_json(history: Sequence[HistoryEntry], index: Mapping[str, int]) -> dict[str, Any]:
    """Return the members ``history`` and ``changes`` of a Program's JSON data.

    Args:
        history: the history of the Program.
        index: the index of each node in its graph, by name.
    """

    def reads(reading: Reads) -> list[Any]:
        return [[position, index.get(name, name)] for position, name in reading]

    def changes(entry: HistoryEntry) -> dict[str, Any] | None:
        if entry.changes is None:
            return None
        data = {
            "inserted": [index.get(name, name) for name in entry.changes.inserted],
            "erased": [
                [name, target_name(node.target), node.module, reads(node.reads)]
                for name, node in entry.changes.erased.items()
            ],
            "rewired": [[index.get(name, name), reads(before)] for name, before in entry.changes.rewired.items()],
        }
        return {key: value for key, value in data.items() if value}

    return {
        "history": [[entry.step, entry.added, entry.removed] for entry in history],
        "changes": [changes(entry) for entry in history],
    }


def history_from_json(data: Mapping[str, Any], names: Sequence[str]) -> list[HistoryEntry]:
    """Return the history in a Program's JSON data.

    Args:
        data: data that `history_to_json` returned; older files have no ``changes``.
        names: names of the nodes of the graph, in order.

    Raises:
        HistoryError: if the data is not a history.
    """

    def typed(value: Any, wanted: type[Any]) -> Any:
        if type(value) is not wanted:
            raise HistoryError(f"expected {wanted.__name__}, got {type(value).__name__}")
        return value

    def name(value: Any) -> str:
        if type(value) is str:
            return value
        if not 0 <= typed(value, int) < len(names):
            raise HistoryError(f"node {value} does not exist; the graph has {len(names)} nodes")
        return str(names[value])

    def reads(value: Any) -> Reads:
        return tuple((typed(position, str), name(source)) for position, source in typed(value, list))

    def changes(value: Any) -> Changes | None:
        if value is None:
            return None
        given = typed(value, dict)
        erased = {
            typed(own, str): ErasedNode(typed(target, str), typed(module, str), reads(read))
            for own, target, module, read in typed(given.get("erased", []), list)
        }
        rewired = {name(node): reads(before) for node, before in typed(given.get("rewired", []), list)}
        return Changes(tuple(map(name, typed(given.get("inserted", []), list))), erased, rewired)

    entries = [(typed(step, str), typed(added, int), typed(removed, int)) for step, added, removed in data["history"]]
    recorded = typed(data.get("changes", [None] * len(entries)), list)
    if len(recorded) != len(entries):
        raise HistoryError(f"changes must be recorded for all {len(entries)} steps, got {len(recorded)}")
    return [HistoryEntry(*entry, 0.0, changes(own)) for entry, own in zip(entries, recorded, strict=True)]
