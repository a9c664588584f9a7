"""Errors for adaptations that are passed instead of a whole spec; the hint shows the spec around them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any

from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.text import printable
from graftc.specs.registry import method_specs

_TARGET = {"role": ["attn.q", "attn.v"]}
MISSING = {
    "adapt": f"list the adaptations: {json.dumps({'adapt': [{'method': 'lora', 'target': _TARGET}]})}",
    "target": f'select sites, for example: "target": {json.dumps(_TARGET)}',
}
"""Hints for missing fields of a spec, by name."""
_MOST = 300
"""Maximum length of a spec in a hint, in characters."""


def bare_entries(data: object) -> GraftError | None:
    """Return the error for adaptations passed instead of a spec or of its list; None for anything else.

    Args:
        data: a mapping with a ``method``, a mapping from methods' tags to their fields, or a list of adaptations.
    """
    if isinstance(data, Mapping):
        if "adapt" in data:
            inner = data["adapt"]
            alone = isinstance(inner, Mapping) and "method" in inner
            return _error("adapt must be a list, not a mapping", [inner]) if alone else None
        if "method" in data:
            return _error("adapt is missing: this is a single adaptation", [data])
        if data and all(key in method_specs() and isinstance(data[key], Mapping | NoneType) for key in data):
            return _error(
                "adapt is missing: methods are not fields of a spec",
                [{"method": key, **(data[key] or {})} for key in data],
            )
    elif isinstance(data, list | tuple) and data and all(isinstance(x, Mapping) and "method" in x for x in data):
        return _error("adapt is missing: this is only the list of adaptations", data)
    return None


def _error(message: str, entries: Sequence[Mapping[Any, Any]]) -> GraftError:
    complete = [{**entry, **({"target": _TARGET} if _lacks_target(entry) else {})} for entry in entries]
    text = printable(json.dumps({"adapt": complete}, default=str, ensure_ascii=False))
    if len(text) > _MOST:
        tag = json.dumps(str(entries[0]["method"])[:50])
        text = f'{{"adapt": [{{"method": {tag}, ...}}]}}'
    return GraftError("GC002", message, hint=f"write {text}")


def _lacks_target(entry: Mapping[Any, Any]) -> bool:
    """Return whether an adaptation has no target although its method has no default target."""
    known = method_specs().get(entry["method"]) if isinstance(entry["method"], str) else None
    return known is not None and "target" not in entry and known.spec_class.model_fields["target"].is_required()
