"""PEFT's tables about models."""

from __future__ import annotations

from collections.abc import Mapping


def merged_projections() -> list[Mapping[str, str]]:
    """Return a table from old to new names for each kind of model whose projections transformers 5 has merged.

    PEFT's public function only converts whole configs. Versions without such a conversion have no table.
    """
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # PEFT 0.18
        return []
    tables: Mapping[str, Mapping[str, str]] = getattr(conversion, "_MOE_TARGET_MODULE_MAPPING", {})
    return list(tables.values())
