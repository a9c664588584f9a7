"""How training starts by a config of peft that nothing has been trained of yet, as fields of the spec."""

from __future__ import annotations

from typing import Any

from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.errors.text import shown
from graftc.specs.foreign.config import AdapterConfig

__all__ = ["starts_of"]


def starts_of(config: AdapterConfig, where: str) -> dict[str, Any]:
    """Fields of our spec about initial values.

    A checkpoint may have any of them, since nothing of it remains in what has been trained; where a config stands for a
    spec, what has no equivalent would start training from other values.

    Raises:
        GraftError: GC112 for a way to start that there is not here.
    """
    found: dict[str, Any] = {}
    for theirs, meanings in config.format[1].starts.items():
        value = config.value(theirs, UNSET)
        if value is UNSET:
            continue
        known = value.lower() if isinstance(value, str) and value.lower() in meanings else value
        if not isinstance(known, str | bool | int | float | None) or known not in meanings:
            words = ", ".join(shown(word) for word in meanings)
            hint = f"the values that work are {words}" if words else "train by PROMPT_TUNING, or by a spec"
            message = f"{theirs}: {shown(value)} starts training from values that there are not here"
            raise GraftError("GC112", message, place=Place(where, path=theirs), hint=hint)
        found |= meanings[known]
    return found


UNSET: Any = object()
"""Stands for a field that a config does not have."""
