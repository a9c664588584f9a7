"""Entries of specs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def lora(
    role: str | Sequence[str] | None = None, *, modules: str | Sequence[str] | None = None, rank: int = 2, **fields: Any
) -> dict[str, Any]:
    """Return an adaptation with LoRA, at roles or at modules."""
    target = {"role": role} if modules is None else {"modules": modules}
    return {"method": "lora", "target": target, "rank": rank, **fields}


def varied(entry: Mapping[str, Any], role: str | Sequence[str] | None = None, **fields: Any) -> dict[str, Any]:
    """Return an adaptation with other fields, and at other roles if a role is given."""
    return {**entry, **({} if role is None else {"target": {"role": role}}), **fields}
