"""The registry of methods: those in this package and in the entry-point group ``graftc.methods``. Torch-free.

An entry point names a package with a module ``spec`` (the spec class and its claims, no torch) and a module ``method``
(the code), which is imported only when the method is used.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from inspect import getdoc, isclass
from itertools import chain
from types import MappingProxyType, ModuleType
from typing import Any

from graftc.specs.base import MethodSpec
from graftc.specs.claims import Claims
from graftc.specs.errors.diagnostics import GraftError, correction
from graftc.specs.errors.text import shown

GROUP = "graftc.methods"
"""The entry-point group of plugins."""

_TAG = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class SpecEntry:
    """One method: its tag, its spec class, the module that defines the class, and the one with its code.

    The `mechanism` of a preset is the tag of the method whose code it runs.
    """

    tag: str
    spec_class: type[MethodSpec]
    module: str
    method_module: str
    mechanism: str | None = None

    @property
    def claims(self) -> Claims:
        """The claims of the method."""
        return self.spec_class.claims

    @property
    def paper(self) -> str:
        """The paper to cite."""
        return self.spec_class.paper

    @property
    def summary(self) -> str:
        """The first line of the spec's docstring."""
        return (getdoc(self.spec_class) or "").partition("\n")[0]

    @property
    def needed(self) -> dict[str, Any]:
        """Example values of the required fields that have one, and of the first field of `one_of`."""
        fields = self.spec_class.model_fields
        shown = self.spec_class.one_of[:1]
        return {n: i.examples[0] for n, i in fields.items() if i.examples and (i.is_required() or n in shown)}


def method_specs() -> MappingProxyType[str, SpecEntry]:
    """Return all methods by tag, in the order of their tags.

    They are discovered once; :func:`reload_methods` starts over.

    Raises:
        GraftError: GC070 if two modules claim one tag, GC071 if a plugin is broken; both name the modules.
    """
    return _discover()


def method_spec(tag: str) -> SpecEntry | None:
    """Return the method with a tag; None if there is none.

    Without plugins no other method is imported. The tags of plugins are not known before they are imported.

    Raises:
        GraftError: the same as for `method_specs`, if there are plugins.
    """
    own = None if _plugins() else _own().get(tag)
    return method_specs().get(tag) if own is None else next((e for e in _from_module(own) if e.tag == tag), None)


def with_code(tag: str) -> tuple[SpecEntry, SpecEntry]:
    """Return the method with a tag, and the one whose code it runs: for a preset its mechanism, otherwise itself.

    Raises:
        GraftError: GC004 for an unknown tag; GC071 if the mechanism that a preset names is not a method with its own
            code.
    """
    entry = method_spec(tag)
    if entry is None:
        raise GraftError("GC004", f"method {tag!r} is unknown")
    if entry.mechanism is None:
        return entry, entry
    mechanism = method_spec(entry.mechanism)
    if mechanism is None or mechanism.mechanism is not None:
        message = f"{tag!r} names {entry.mechanism!r} as its mechanism, which is not a method with its own code"
        raise GraftError("GC071", message, hint="a mechanism is the tag of a method that is not a preset")
    return entry, mechanism


def reload_methods() -> None:
    """Clear the cached methods, so that plugins installed since then are found."""
    for function in (_discover, _plugins, _own, _from_module):
        function.cache_clear()


@cache
def _discover() -> MappingProxyType[str, SpecEntry]:
    entries: dict[str, SpecEntry] = {}
    own = (entry for name in _own().values() for entry in _from_module(name))
    for entry in chain(own, (entry for point in _plugins() for entry in _from_plugin(point))):
        other = entries.setdefault(entry.tag, entry)
        if other.spec_class is not entry.spec_class:
            message = f"the method '{entry.tag}' is defined in {other.module} and in {entry.module}"
            raise GraftError("GC070", message, hint="rename one of them or uninstall its package")
    return MappingProxyType(dict(sorted(entries.items())))


@cache
def _plugins() -> tuple[EntryPoint, ...]:
    return tuple(sorted(entry_points(group=GROUP), key=lambda p: (p.name, p.value)))


@cache
def _own() -> dict[str, str]:
    """Return the names of the modules in this package's folder of methods, by the tag of the method in each."""
    import graftc.specs.methods as package

    return {info.name: f"{package.__name__}.{info.name}" for info in pkgutil.iter_modules(package.__path__)}


@cache
def _from_module(name: str) -> tuple[SpecEntry, ...]:
    module = importlib.import_module(name)
    code = f"graftc.passes.methods.{name.rpartition('.')[2]}"
    return tuple(_entry(spec_class, code, name) for spec_class in _spec_classes(module))


def _spec_classes(module: ModuleType) -> list[type[MethodSpec]]:
    classes = [c for c in vars(module).values() if isclass(c) and issubclass(c, MethodSpec)]
    return [c for c in dict.fromkeys(classes) if c.__module__ == module.__name__ and c.tag() is not None]


def _entry(spec_class: type[MethodSpec], method_module: str, where: str) -> SpecEntry:
    tag = spec_class.tag()
    name = f"{where}.{spec_class.__qualname__}"
    if tag is None or not _TAG.fullmatch(tag):
        hint = "a tag is lower case: letters, digits and underscores"
        raise GraftError("GC071", f"the tag {tag!r} of {name} is not usable", hint=hint)
    if not isinstance(getattr(spec_class, "claims", None), Claims):
        raise GraftError("GC071", f"{name} has no claims", hint="set the class variable claims = Claims(...)")
    # A subclass of a preset that has its own code is not a preset.
    return SpecEntry(tag, spec_class, where, method_module, vars(spec_class).get("mechanism"))


def _from_plugin(point: EntryPoint) -> list[SpecEntry]:
    owner = f"the plugin '{point.name}' ({point.value})"
    try:
        module = importlib.import_module(f"{point.module}.spec")
        classes = _spec_classes(module)
    except Exception as error:  # the import of a plugin may fail in any way, and the message must name the plugin
        hint = f"repair or uninstall the package that provides {point.module}"
        raise GraftError("GC071", f"{owner} cannot be imported: {type(error).__name__}: {error}", hint=hint) from error
    if not classes:
        hint = "define a subclass of graftc.extend.MethodSpec there, with method: Literal['tag'] = 'tag'"
        raise GraftError("GC071", f"{owner} has no method in {module.__name__}", hint=hint)
    return [_entry(c, f"{point.module}.method", module.__name__) for c in classes]


def unknown_method(tag: object) -> GraftError:
    """Return the error GC004 for a tag that no method has, with the nearest tags."""
    tags = list(method_specs())
    every = f"the methods are: {', '.join(tags)}; a plugin's method needs its package in this environment"
    hint, fix = correction(tag, tags, every)
    return GraftError("GC004", f"method {shown(tag)} is unknown", hint=hint, fix=fix)
