"""Configs of other libraries, given where a spec is expected: what to write instead."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from graftc.specs.errors.diagnostics import GraftError, Place

__all__ = ["refuse_foreign"]

_METHODS = {
    "LORA": "lora",
    "ADALORA": "adalora",
    "VERA": "vera",
    "LOHA": "loha",
    "LOKR": "lokr",
    "IA3": "ia3",
    "PREFIX_TUNING": "prefix",
    "P_TUNING": "prompt",
    "PROMPT_TUNING": "prompt",
    "LN_TUNING": "norms",
}
_FIELDS = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "num_virtual_tokens": "length"}


def refuse_foreign(source: object, place: Place | None = None) -> None:
    """Refuse a config of peft, as an object or as data, or several by name.

    Raises:
        GraftError: GC073 with an adaptation that says the same as far as it can be told.
    """
    found = [source, *source.values()] if isinstance(source, Mapping) else [source]
    kinds = [(config, kind) for config in found if (kind := _get(config, "peft_type")) is not None]
    if kinds:
        config, kind = kinds[0]
        what = f"a config of peft ({type(config).__name__})" if not isinstance(config, Mapping) else "a config of peft"
        hint = f"write for example {{adapt: [{json.dumps(_adaptation(config, kind))}]}}"
        raise GraftError("GC073", f"{what} is no spec", place=place, hint=hint)


def _get(config: object, name: str) -> Any:
    if isinstance(config, Mapping):
        return config.get(name)
    return None if isinstance(config, type) else getattr(config, name, None)


def _adaptation(config: object, kind: Any) -> dict[str, Any]:
    tag = str(getattr(kind, "value", kind))
    method = "dora" if _get(config, "use_dora") is True else _METHODS.get(tag, tag.lower()[:40])
    written: dict[str, Any] = {"method": method}
    for theirs, ours in _FIELDS.items():
        value = _get(config, theirs)
        if isinstance(value, int | float) and not isinstance(value, bool):
            written[ours] = value
    targets = _get(config, "target_modules")
    if isinstance(targets, list | tuple | set | frozenset):
        written["target"] = {"modules": [f"**.{name[:40]}" for name in sorted(map(str, targets))[:8]]}
    return written
