"""The names of a cache in calls and outputs: releases of transformers before 5.24, and older code, have another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

CACHES = ("cache", "past_key_values")
"""Names of the cache parameter of ``forward``, and of the field of outputs: the current one, and the older one."""


def cache_name(parameters: Iterable[str]) -> str | None:
    """Return the name of the cache parameter among the parameters of a ``forward``; None if there is none."""
    return next((name for name in CACHES if name in parameters), None)


def under_own_name(arguments: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    """Return the arguments of a call, with a cache that has either name under the one that ``forward`` has for it.

    Args:
        arguments: the arguments by name; two caches stay as they are.
        name: the name of the cache parameter; None if there is none, and then nothing changes.
    """
    passed = [other for other in CACHES if arguments.get(other) is not None]
    if name is None or len(passed) != 1:
        return dict(arguments)
    others = {other: value for other, value in arguments.items() if other not in CACHES}
    return {**others, name: arguments[passed[0]]}


def cache_of(outputs: Mapping[str, Any]) -> Any:
    """Return the cache in a model's outputs, whichever name it has there; None if there is none."""
    return next((outputs[name] for name in CACHES if outputs.get(name) is not None), None)
