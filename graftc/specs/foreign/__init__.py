"""Read peft configs with the methods' tables, and convert them to equivalent specs. Imports neither torch nor peft."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def is_foreign(source: object) -> bool:
    """Return whether ``source`` is a peft config, as an object or plain data, or a mapping of peft configs by name."""
    configs = [source, *source.values()] if isinstance(source, Mapping) else [source]
    return any(_kind(config) is not None for config in configs)


def _kind(config: object) -> Any:
    if isinstance(config, Mapping):
        return config.get("peft_type")
    return None if isinstance(config, type) else getattr(config, "peft_type", None)


def check_config(source: object, where: str) -> None:
    """Raise an error unless the source is a peft config that has an equivalent here, for any model.

    Raises:
        GraftError: as for `translated`.
    """
    from graftc.specs.foreign.config import read_config
    from graftc.specs.foreign.starts import starts_of
    from graftc.specs.foreign.translate import as_data

    starts_of(read_config(as_data(source), where), where)


def translated(source: object, where: str = "the config") -> dict[str, Any]:
    """Return the spec equivalent to a peft config, as plain data.

    Raises:
        GraftError: GC073 for several configs; GC111 and GC112 as for `graftc.specs.foreign.config.read_config`.
    """
    from graftc.specs.foreign.translate import translate

    return translate(source, where)
