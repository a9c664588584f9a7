"""Configs of peft: read as data by the tables of methods, and the spec that says the same. No torch, and no peft."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["check_config", "is_foreign", "translated"]


def is_foreign(source: object) -> bool:
    """Whether something is a config of peft, as an object or as data, or several by name."""
    found = [source, *source.values()] if isinstance(source, Mapping) else [source]
    return any(_kind(config) is not None for config in found)


def _kind(config: object) -> Any:
    if isinstance(config, Mapping):
        return config.get("peft_type")
    return None if isinstance(config, type) else getattr(config, "peft_type", None)


def check_config(source: object, where: str) -> None:
    """Refuse what is not a config of peft, and what has no equivalent here whatever the model.

    Raises:
        GraftError: as `translated`.
    """
    from graftc.specs.foreign.config import read_config
    from graftc.specs.foreign.starts import starts_of
    from graftc.specs.foreign.translate import as_data

    starts_of(read_config(as_data(source), where), where)


def translated(source: object, where: str = "the config") -> dict[str, Any]:
    """The spec that says the same as a config of peft, as plain data.

    Raises:
        GraftError: GC073 for several configs, GC111 and GC112 as `graftc.specs.foreign.config.read_config`.
    """
    from graftc.specs.foreign.translate import translate

    return translate(source, where)
