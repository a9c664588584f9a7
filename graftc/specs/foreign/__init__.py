"""Configs of peft: reading by the tables of methods, and conversion to the equivalent spec. No torch, and no peft."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def is_foreign(source: object) -> bool:
    """Return whether something is a config of peft, as an object or as data, or a mapping with several by name."""
    configs = [source, *source.values()] if isinstance(source, Mapping) else [source]
    return any(_kind(config) is not None for config in configs)


def _kind(config: object) -> Any:
    if isinstance(config, Mapping):
        return config.get("peft_type")
    return None if isinstance(config, type) else getattr(config, "peft_type", None)


def check_config(source: object, where: str) -> None:
    """Raise unless the source is a config of peft that has an equivalent here, for any model.

    Raises:
        GraftError: the same as for `translated`.
    """
    from graftc.specs.foreign.config import read_config
    from graftc.specs.foreign.starts import starts_of
    from graftc.specs.foreign.translate import as_data

    starts_of(read_config(as_data(source), where), where)


def translated(source: object, where: str = "the config") -> dict[str, Any]:
    """Return the spec that is equivalent to a config of peft, as plain data.

    Raises:
        GraftError: GC073 for several configs, GC111 and GC112 as for `graftc.specs.foreign.config.read_config`.
    """
    from graftc.specs.foreign.translate import translate

    return translate(source, where)
