"""Check export options: any that the format does not declare is refused, never ignored. Does not load torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from graftc.runtime.export.exporter import Exporter
from graftc.runtime.export.registry import exporters
from graftc.specs.errors.diagnostics import GraftError, alternatives
from graftc.specs.errors.text import listed


def misplaced(exporter: Exporter, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the given options that the format does not have, each with a remedy.

    Args:
        exporter: the format's exporter.
        given: options by name; None, False or an empty value counts as not given.
    """
    own = [option.name for option in exporter.options]
    for name, value in given.items():
        empty = isinstance(value, str | list | tuple | dict) and not value
        if name in own or value is None or value is False or empty:
            continue
        takers = [other.name for other in exporters().values() if name in (option.name for option in other.options)]
        elsewhere = f"leave it out: it is an option of {listed(takers)}" if takers or not own else None
        yield name, exporter.instead.get(name) or elsewhere or alternatives(name, own, "options")


def options_for(exporter: Exporter, given: Mapping[str, Any]) -> dict[str, Any]:
    """Check the given options of an export, and return them.

    Raises:
        GraftError: GC073 for an option that the format does not have, or that has no effect without another, or for a
            value that the option does not allow.
    """
    for name, hint in misplaced(exporter, given):
        raise GraftError("GC073", f"the format {exporter.name!r} has no option {name}", hint=hint)
    for option in exporter.options:
        if option.needs and given.get(option.name) is not None and not given.get(option.needs):
            hint = f"add {option.needs}, or leave out {option.name}"
            raise GraftError("GC073", f"{option.name} has no effect without {option.needs}", hint=hint)
    with exporter.reported():
        return {o.name: o.checked(given[o.name]) for o in exporter.options if given.get(o.name) is not None}
