"""Detect user code that may distinguish layers by something other than their contents.

Alike layers are traced once because all of their contents are known, and reads of differing values are recorded. Code
that bypasses attributes (``vars``, ``__dict__``), uses the identity of an object (``id``), or reads and writes state
outside the model (globals, closures, context variables) may behave differently in each layer. The difference, such as a
stopped gradient or a bound on large values, need not be visible in outputs on samples. Library code is trusted.
"""

from __future__ import annotations

import dis
import inspect
import itertools
import logging
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextvars import ContextVar
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from graftc.compiler.capture.identity.objects import closure_of
from graftc.compiler.capture.identity.sources import codes_in, home_of, home_of_module

_ASKING = frozenset({"vars", "id", "globals", "locals"})
_CONTAINERS = frozenset({list, dict, set, bytearray, deque, defaultdict, OrderedDict, Counter})
_STATEFUL = (ContextVar, threading.local, Iterator)
_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, logging.Logger)
_SEEN_BY_THE_TRACER = (type, ModuleType, nn.Module, torch.Tensor)


class LooksElsewhere:
    """Checks modules' classes for code that may distinguish alike layers, once for each class."""

    def __init__(self) -> None:
        self._classes: dict[type, bool] = {}

    def of(self, module: nn.Module) -> bool:
        """Return whether a module's class has such code outside ``__init__``, or slots, whose values are unknown."""
        kind = type(module)
        if kind not in self._classes:
            self._classes[kind] = any(map(_class_does, kind.__mro__))
        return self._classes[kind]


def _class_does(kind: type) -> bool:
    if kind is object or home_of_module(kind.__module__) != "user":
        return False
    if vars(kind).get("__slots__"):
        return True
    met: set[CodeType] = set()
    return any(_does(function, met) for name, function in _functions(kind) if name != "__init__")


def _functions(kind: type) -> Iterator[tuple[str, FunctionType]]:
    for name, value in vars(kind).items():
        inner = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if isinstance(inner := inspect.unwrap(inner) if callable(inner) else inner, FunctionType):
            yield name, inner


def _does(function: FunctionType, met: set[CodeType]) -> bool:
    if function.__code__ in met or home_of(function) != "user":
        return False
    met.add(function.__code__)
    codes = list(codes_in(function.__code__))
    free = function.__code__.co_freevars
    for instruction in itertools.chain.from_iterable(map(dis.get_instructions, codes)):
        operation, name = instruction.opname, instruction.argval
        writes = operation in ("STORE_GLOBAL", "DELETE_GLOBAL") or (operation == "STORE_DEREF" and name in free)
        if writes or name == "__dict__" or (name in _ASKING and operation in ("LOAD_GLOBAL", "LOAD_NAME")):
            return True
    return any(_may_change(value, met) for value in _mentioned(function, codes))


def _mentioned(function: FunctionType, codes: list[CodeType]) -> Iterator[Any]:
    """Yield a function's closure values, the globals that it mentions, and the members of user modules among them."""
    names = {name for code in codes for name in code.co_names}
    yield from (value for _, filled, value in closure_of(function) if filled)
    for name in names & function.__globals__.keys():
        value = function.__globals__[name]
        yield value
        if isinstance(value, ModuleType) and home_of_module(value.__name__) == "user":
            yield from (vars(value)[own] for own in names & vars(value).keys())


def _may_change(value: Any, met: set[CodeType]) -> bool:
    """Return whether a value may change, or may return something else, from one layer to the next."""
    if isinstance(value, FunctionType | MethodType):
        inner = value.__func__ if isinstance(value, MethodType) else value
        return isinstance(inner, FunctionType) and _does(inner, met)
    if isinstance(value, (*_PLAIN, *_SEEN_BY_THE_TRACER)):
        return False
    if isinstance(value, tuple | frozenset):
        return any(_may_change(item, met) for item in value)
    if type(value) in _CONTAINERS or isinstance(value, _STATEFUL):
        return True
    return home_of_module(type(value).__module__) == "user"
