"""Look up methods by tag.

A method's code is in the pass file named after its spec file, in its mechanism's pass file if it is a preset, or in a
plugin.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any, cast

from graftc.passes.core.method.method import Method
from graftc.passes.core.sites.sites import (
    AttentionSite,
    EmbeddingSite,
    ExpertsSite,
    LinearSite,
    NormSite,
    ParameterSite,
    Site,
    SublayerSite,
    ValueSite,
)
from graftc.specs.claims import SiteKind
from graftc.specs.errors.diagnostics import GraftError, first_line
from graftc.specs.registry import SpecEntry, with_code


def method_for(tag: str) -> Method[Any, Any]:
    """Return the method with this tag.

    Raises:
        GraftError: GC004 for an unknown tag; GC071 when its module contains no `Method` for its spec, or when a preset
            names a mechanism that is not a method with code of its own.
    """
    return _checked(*with_code(tag))


@cache
def _checked(entry: SpecEntry, mechanism: SpecEntry) -> Method[Any, Any]:
    """Return a mechanism's method after checking that it accepts all sites that the tag claims."""
    method = _method(mechanism)
    wrong = [kind for kind in sorted(entry.claims.sites) if not issubclass(_SITES[kind], method.site_classes)]
    if wrong:
        takes = ", ".join(cls.__name__ for cls in method.site_classes)
        message = f"{entry.tag!r} claims sites of kind {str(wrong[0])!r}, but {type(method).__name__} accepts {takes}"
        raise GraftError("GC071", message, hint="name the class of every claimed site: Method[Spec, LinearSite]")
    return method


_SITES: Mapping[SiteKind, type[Site]] = {
    SiteKind.LINEAR: LinearSite,
    SiteKind.EMBEDDING: EmbeddingSite,
    SiteKind.EXPERTS: ExpertsSite,
    SiteKind.ATTENTION: AttentionSite,
    SiteKind.SUBLAYER: SublayerSite,
    SiteKind.NORM: NormSite,
    SiteKind.VALUE: ValueSite,
    SiteKind.PARAMETER: ParameterSite,
}
"""The site class of each kind."""


@cache
def _method(entry: SpecEntry) -> Method[Any, Any]:
    try:
        module = importlib.import_module(entry.method_module)
    except Exception as error:  # a plugin's import may fail in any way, and the message must name the plugin
        message = f"{entry.method_module}, the code of {entry.tag!r}, cannot be imported: {first_line(error)}"
        raise GraftError("GC071", message) from error
    for value in (value for name, value in vars(module).items() if not name.startswith("_")):
        is_method = inspect.isclass(value) and issubclass(value, Method) and not inspect.isabstract(value)
        if is_method and getattr(value, "spec_class", None) is entry.spec_class:
            return cast("Method[Any, Any]", value())
    raise GraftError("GC071", f"{entry.method_module} has no Method whose spec_class is {entry.spec_class.__name__}")
