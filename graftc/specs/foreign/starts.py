"""Convert the initialisation in a peft config that is used as a spec to fields of the spec."""

from __future__ import annotations

from typing import Any, get_args

from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.errors.text import shown
from graftc.specs.foreign.config import AdapterConfig


def starts_of(config: AdapterConfig, where: str) -> dict[str, Any]:
    """Return the fields of our spec that set initial values.

    A checkpoint may have any initialisation, since the trained tensors no longer depend on it; but if a config is used
    as a spec, an initialisation without an equivalent would start training from different values.

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
            hint = f"the supported values are {words}" if words else "train with PROMPT_TUNING, or with a spec"
            ours = config.format[1].fields.get(theirs, "")
            field = config.format[0].model_fields.get(ours)
            if field is not None and value in get_args(field.annotation):
                hint = f"use a spec with {ours}: {value} instead"
            message = f"{theirs}: {shown(value)} is an initialisation that has no equivalent here"
            raise GraftError("GC112", message, place=Place(where, path=theirs), hint=hint)
        fields |= meanings[known]
    return fields


UNSET: Any = object()
"""The value of a field that a config does not have."""
