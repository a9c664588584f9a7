"""What peft knows about models."""

from __future__ import annotations

from collections.abc import Mapping


def merged_projections() -> list[Mapping[str, str]]:
    """Return, for each kind of model whose projections transformers 5 has merged, their earlier names with the new one.

    peft only offers the conversion of whole configs. Versions that convert none have no such table.
    """
    from peft.utils import transformers_weight_conversion as conversion

    tables: Mapping[str, Mapping[str, str]] = getattr(conversion, "_MOE_TARGET_MODULE_MAPPING", {})
    return list(tables.values())
