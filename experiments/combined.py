"""The task of a cell that trains on several: their names in one string. Plans read it, so it imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

_BETWEEN = "+"


def combined(tasks: Sequence[str]) -> str:
    """Return one name for several tasks."""
    return _BETWEEN.join(tasks)


def tasks_in(name: str) -> list[str]:
    """Return the tasks in a name; one, if it is the name of a task."""
    return name.split(_BETWEEN)
