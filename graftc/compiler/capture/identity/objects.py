"""Inspect functions, classes and objects without running any of their code."""

from __future__ import annotations

import collections
import functools
import types
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from torch import nn

from graftc.compiler.capture.identity.sources import home_of, home_of_module

VALUES: tuple[Any, ...] = (int, float, complex, str, bytes)
_COLLECTIONS = (dict, collections.OrderedDict, collections.defaultdict, list, tuple, set, frozenset, collections.deque)
_TRANSPARENT = frozenset({object, types.SimpleNamespace, types.MappingProxyType, *VALUES, *_COLLECTIONS})
"""Classes whose instances have fully visible contents, in addition to those written in Python."""

_HEAP = 1 << 9
"""The type flag of classes that were created at run time, such as those written in Python."""


def is_fixed(function: types.FunctionType) -> bool:
    """Return whether a function comes entirely from torch or Python; a decorated one may contain a user's function."""
    return home_of(function) == "fixed" and not function.__closure__


def is_foreign(value: Any) -> bool:
    """Return whether an object in a module of torch or Python was put there by other code."""
    if isinstance(value, types.FunctionType):
        return not is_fixed(value)
    if isinstance(value, types.ModuleType):
        return True
    return isinstance(value, type) and home_of_module(value.__module__) != "fixed"


def defined(cls: type) -> dict[str, list[Any]]:
    """Return all definitions of each name in a class and its bases.

    All of them matter because a method may call the one that it overrides. torch's and Python's own classes are left
    out, since they are the same everywhere, except subclasses of `nn.Module`, where something may have been replaced.
    """
    definitions: dict[str, list[Any]] = {}
    for base in cls.__mro__:
        if home_of_module(base.__module__) != "fixed" or issubclass(base, nn.Module):
            for name, value in vars(base).items():
                definitions.setdefault(name, []).append(value)
    return definitions


def parts_of(value: Any) -> list[Any]:
    """Return the functions behind a class attribute."""
    if isinstance(value, staticmethod | classmethod):
        return [value.__func__]
    if isinstance(value, property):
        return [part for part in (value.fget, value.fset) if part is not None]
    if isinstance(value, functools.cached_property):
        return [value.func]
    if isinstance(value, functools.partialmethod):
        return [value.func, value.args, value.keywords]
    return [value]


def closure_of(function: types.FunctionType) -> Iterator[tuple[str, bool, Any]]:
    """Yield the name of each variable in a function's closure, whether it has a value yet, and the value."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield name, True, cell.cell_contents
        except ValueError:
            yield name, False, None


def is_plain(cls: type) -> bool:
    """Return whether the contents of this class's instances are fully visible, as attributes and items."""
    for base in cls.__mro__:
        if base in _TRANSPARENT:
            continue
        parent = base.__base__
        slots = sum(isinstance(value, types.MemberDescriptorType) for value in vars(base).values())
        slots += sum(name in vars(base) for name in ("__dict__", "__weakref__"))
        hidden = base.__basicsize__ - (parent.__basicsize__ if parent is not None else 0) - 8 * slots
        if not base.__flags__ & _HEAP or hidden > 0:
            return False
    return True


def slots_of(value: Any) -> dict[str, Any]:
    """Return the values in an object's slots, by name."""
    contents: dict[str, Any] = {}
    for base in type(value).__mro__:
        if base not in _TRANSPARENT:
            for name, slot in vars(base).items():
                if isinstance(slot, types.MemberDescriptorType):
                    with suppress(AttributeError):
                        contents[name] = slot.__get__(value)
    return contents
