"""Methods by tag: the pass file beside each spec file, that of its mechanism for a preset, and installed plugins."""

from __future__ import annotations

import importlib
import inspect
from functools import cache
from typing import Any

from graftc.passes.core.method.method import Method
from graftc.specs.errors.diagnostics import GraftError, first_line
from graftc.specs.registry import SpecEntry, method_specs


def method_for(tag: str) -> Method[Any]:
    """The method with this tag.

    Raises:
        GraftError: GC004 for an unknown tag; GC071 when its module holds no `Method` for its spec, or when the
            mechanism that a preset names is no method with code of its own.
    """
    entries = method_specs()
    if tag not in entries:
        raise GraftError("GC004", f"method {tag!r} is unknown")
    entry = entries[tag]
    if entry.mechanism is None:
        return _method(entry)
    mechanism = entries.get(entry.mechanism)
    if mechanism is None or mechanism.mechanism is not None:
        message = f"{tag!r} names {entry.mechanism!r} as its mechanism, which is no method with code of its own"
        raise GraftError("GC071", message, hint="a mechanism is the tag of a method that is no preset")
    return _method(mechanism)


@cache
def _method(entry: SpecEntry) -> Method[Any]:
    try:
        module = importlib.import_module(entry.method_module)
    except Exception as error:  # a plugin's import may fail in any way, and the message must name the plugin
        message = f"{entry.method_module}, the code of {entry.tag!r}, cannot be imported: {first_line(error)}"
        raise GraftError("GC071", message) from error
    for value in vars(module).values():
        is_method = inspect.isclass(value) and issubclass(value, Method) and not inspect.isabstract(value)
        if is_method and getattr(value, "spec_class", None) is entry.spec_class:
            method: Method[Any] = value()
            return method
    raise GraftError("GC071", f"{entry.method_module} has no Method whose spec_class is {entry.spec_class.__name__}")
