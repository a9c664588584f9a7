"""Initial values of a peft config that is used as a spec, as fields of the spec."""

from __future__ import annotations

from typing import Any

from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.errors.text import shown
from graftc.specs.foreign.config import AdapterConfig


def starts_of(config: AdapterConfig, where: str) -> dict[str, Any]:
    """Return the fields of our spec about initial values.

    A checkpoint may have any of them, since nothing of them remains in what has been trained; if a config is used as a
    spec, one without an equivalent would start training from other values.

    Raises:
        GraftError: GC112 for an initialisation that has no equivalent.
    """
    fields: dict[str, Any] = {}
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
        fields |= meanings[known]
    return fields


UNSET: Any = object()
"""The value of a field that a config does not have."""
