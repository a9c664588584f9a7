"""Record, as data, everything that a model's capture depends on: its modules' contents, and the code they reach.

The walk starts at the modules of the model. Plain values are recorded directly; functions are recorded by their code,
their defaults, their closures and the globals that they mention, recursively; classes by the members that the reached
code mentions by name. torch and Python are identified by their versions and not walked, unless something in them was
replaced. Two models could differ unnoticed in anything that cannot be serialised, so the walk reports such a value and
its location.
"""

from __future__ import annotations

import collections
import enum
import functools
import hashlib
import json
import logging
import pathlib
import re
import types
import weakref
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from graftc.compat.hooks import BACKWARD, FORWARD, global_hooks
from graftc.compat.modules import RUN_BY_CALLS, children_of, is_compiled, transient_of
from graftc.compat.operators import OperatorBase, OpOverloadPacket
from graftc.compat.transformers import ABOUT_ORIGIN, OF_A_PROCESS, recorded_outputs
from graftc.compiler.capture.identity.fingerprint import config_digest
from graftc.compiler.capture.identity.objects import (
    VALUES,
    closure_of,
    defined,
    is_fixed,
    is_foreign,
    is_plain,
    parts_of,
    slots_of,
)
from graftc.compiler.capture.identity.sources import digest_of, home_of, home_of_module, names_of
from graftc.compiler.capture.isolation import unheard
from graftc.passes.core.ir.shapes import raw_bytes

LARGEST_TENSOR = 65536
"""The maximum size in bytes of tensors other than parameters and buffers; with a larger one, nothing is stored."""

_RECORDING = "transformers.utils.output_capturing"
"""The module whose hooks transformers adds to a model in its first forward pass, even if that pass is captured."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), type(NotImplemented))
_NAMED = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, pathlib.PurePath, range)
_PROTOCOL = """
    call getattr getattribute setattr delattr getitem setitem delitem missing contains iter next len length_hint bool
    enter exit await eq ne lt le gt ge hash neg pos abs invert add sub mul matmul truediv floordiv mod divmod pow lshift
    rshift and or xor radd rsub rmul rmatmul rtruediv rfloordiv rmod rdivmod rpow rlshift rrshift rand ror rxor iadd
    isub imul imatmul itruediv ifloordiv imod ipow ilshift irshift iand ior ixor int float complex index round trunc
    floor ceil str format get set delete torch_function torch_dispatch instancecheck subclasscheck class_getitem
"""
_CALLS = frozenset({"forward", "train", *RUN_BY_CALLS, *(f"__{n}__" for n in _PROTOCOL.split())})
"""Methods that run without being mentioned by name."""

_CREATED = _CALLS | {"__init__", "__new__", "__post_init__"}
"""Methods that run without being mentioned by name, of classes that code may instantiate."""

_OUTSIDE_NAMES = """
environ environb getenv argv open read_text read_bytes import_module __import__ globals locals vars eval exec compile
backends get_num_threads get_float32_matmul_precision get_default_dtype getpid time perf_counter now today
__doc__ __annotations__ _getframe stack currentframe
"""
_OUTSIDE = frozenset(_OUTSIDE_NAMES.split())
"""Names that provide code and values from outside a model: the environment, files, modules by name, torch settings.
Captures of a model whose own code mentions any of them are not stored."""

_MADE_OF_PARTS: tuple[tuple[type, str, Callable[[Any], Sequence[Any]]], ...] = (
    (functools.partial, "partial", lambda value: (value.func, value.args, value.keywords)),
    (types.MethodType, "method", lambda value: (value.__func__, value.__self__)),
    (weakref.ref, "reference", lambda value: (value(),)),
    (slice, "slice", lambda value: ((value.start, value.stop, value.step),)),
)
"""Types, each with a label and a function that returns the parts of a value."""

_BUILTINS = (
    types.BuiltinFunctionType,
    types.MethodWrapperType,
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
)
_DESCRIPTORS = (types.MethodDescriptorType, types.GetSetDescriptorType, types.MemberDescriptorType)
_METHODS = (types.FunctionType, staticmethod, classmethod, functools.partialmethod)


class UnknownHoldingError(Exception):
    """Raised for something that a capture may depend on but that cannot be serialised.

    Args:
        where: the module's path and the attribute.
        what: the reason.
    """

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{where}: {what}")


def holdings(model: nn.Module) -> list[Any]:
    """Return everything that a capture of ``model`` depends on besides the request and versions, as JSON data.

    Values of parameters and buffers are not included, since graphs read them, and neither is the mode.

    Raises:
        UnknownHoldingError: if something cannot be serialised: an object of unknown type, a hook, a replaced method.
    """
    known = _KNOWN.get()
    if known is None:
        return _holdings(model)
    if model not in known:
        known[model] = _holdings(model)
    return known[model]


def _holdings(model: nn.Module) -> list[Any]:
    try:
        return _Walk(model).run()
    except UnknownHoldingError:
        raise
    except Exception as error:  # attributes may be of any type, and inspecting them may run their code
        raise UnknownHoldingError(type(model).__name__, f"{type(error).__name__} during inspection") from error


_KNOWN: ContextVar[dict[nn.Module, list[Any]] | None] = ContextVar("_KNOWN", default=None)


@contextmanager
def walked_once() -> Iterator[None]:
    """Let `holdings` inspect each model only once while the block runs; models must not change meanwhile."""
    token = _KNOWN.set({})
    try:
        yield
    finally:
        _KNOWN.reset(token)


def digests_of_holdings(model: nn.Module) -> dict[str, str] | None:
    """Return digests of the contents of a model's modules, by attribute path, and of the code that they reach.

    Return None if something cannot be serialised. Of a config, only the settings that distinguish bases count; which
    tensors require a gradient is up to the user and does not count.
    """
    try:
        tensors, modules, code = holdings(model)
    except UnknownHoldingError:
        return None
    classes = {path: repr(type(module)) for path, module in model.named_modules(remove_duplicate=False)}
    contents: dict[str, Any] = {"config": config_digest(getattr(model, "config", None))}
    for path, cls, *rest in modules:
        if cls == "is":
            contents[f"the module {path}"] = rest
            continue
        children, values, buffers = rest
        contents[f"the module {path}".rstrip()] = [classes[path], children, buffers]
        contents |= {_join(path, name): value for name, value in values if name != "config"}
    contents["set of tensors"] = [tensor for tensor in tensors if isinstance(tensor, tuple)]
    contents["code"] = code
    return {name: hashlib.sha256(json.dumps(value).encode()).hexdigest() for name, value in contents.items()}


def holdings_of_modules(model: nn.Module, among: Set[str] | None = None) -> dict[str, list[Any]]:
    """Return the contents of a model's modules by path, as JSON data that is equal for modules with equal contents.

    The data consists of the module's class, the names of its submodules, its attributes, and the names of its buffers
    that are not in checkpoints. Modules with contents that cannot be serialised are left out, and so are those that are
    not ``among`` the given paths.
    """
    walk = _Walk(model)
    contents: dict[str, list[Any]] = {}
    for path, module in model.named_modules():
        with suppress(UnknownHoldingError):
            if among is None or path in among:
                contents[path] = walk.module(path, module)[1:]
    return contents


def _is_own(hook: Any) -> bool:
    """Return whether a global module hook is graftc's own; such hooks only inspect compiled models."""
    return str(getattr(hook, "__module__", "")).partition(".")[0] == "graftc"


class _Walk:
    """One walk over a model. Objects are numbered in the order of the walk, so that equal models give equal data."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._kinds = {str(type(module)) for module in model.modules()}
        self._tensors: dict[int, str] = {}
        self._numbers: dict[int, int] = {}
        self._told: dict[tuple[int, bool], Any] = {}
        self._alive: list[Any] = []
        self._functions: list[tuple[types.FunctionType, str]] = []
        self._classes: dict[type, dict[str, list[Any]]] = {}
        self._pending: list[tuple[type, Set[str]]] = []
        self._created: set[type] = set()
        self._code: list[Any] = []
        self._names: set[str] = set()
        self._fresh: set[str] = set()

    def run(self) -> list[Any]:
        """Return the result of `holdings` for the model."""
        for kind, hooks in global_hooks().items():
            if not all(unheard(hook) or _is_own(hook) for hook in hooks.values()):
                raise UnknownHoldingError(kind, "hooks on every module of the process")
        tensors = self._stored()
        modules = [self.module(path, module) for path, module in self._model.named_modules(remove_duplicate=False)]
        code = self._reached()
        if "requires_grad" in self._names:
            tensors.append([p.requires_grad for p in self._model.parameters()])
        return [tensors, modules, code]

    def _stored(self) -> list[Any]:
        stored: list[Any] = []
        for kind, named in (("parameter", self._model.named_parameters), ("buffer", self._model.named_buffers)):
            for name, tensor in named(remove_duplicate=False):
                owner = self._tensors.setdefault(id(tensor), name)
                cls = type(tensor)
                laid_out = None if tensor.layout != torch.strided or tensor.is_contiguous() else list(tensor.stride())
                stored.append(
                    (
                        *(kind, name, owner, str(tensor.dtype), list(tensor.shape), cls.__qualname__),
                        *(tensor.device.type, laid_out),
                    )
                )
        return stored

    def module(self, path: str, module: nn.Module) -> list[Any]:
        if self._paths[id(module)] != path:
            return [path, "is", self._paths[id(module)]]
        return [path, *self._contents(module, path, strict=True)]

    def _contents(self, module: nn.Module, path: str, *, strict: bool) -> list[Any]:
        """Return a module's class, the names of its submodules, its attributes and its buffers without checkpoints."""
        attributes = vars(module)
        for table in (*FORWARD, *BACKWARD):
            for hook in attributes[table].values():
                if getattr(hook, "__module__", None) != _RECORDING or not isinstance(hook, types.FunctionType):
                    raise UnknownHoldingError(path or "the model", f"a hook ({table.strip('_')})")
        if is_compiled(module):
            raise UnknownHoldingError(path or "the model", "a compiled call")
        number = self._class(type(module))
        known = self._classes[type(module)]
        for name in attributes:
            if name not in _MODULE and any(isinstance(value, _METHODS) for value in known.get(name, ())):
                raise UnknownHoldingError(_join(path, name), "replaces a method of the class")
        values = [
            [name, self._value(attributes[name], _join(path, name), strict=strict)]
            for name in sorted(attributes.keys() - _MODULE - ABOUT_ORIGIN)
        ]
        return [number, list(children_of(module)), values, sorted(transient_of(module))]

    def _outside(self, module: nn.Module, where: str, strict: bool) -> Any:
        """Return a module that is not in the model's tree, such as transformers' wrappers of functions."""
        if any(True for _ in (*module.parameters(), *module.buffers())):
            return self._opaque(module, where, "a module outside of the tree", strict)
        inner = [[name, self._value(child, where, strict=strict)] for name, child in children_of(module).items()]
        return ["outside", module.training, *self._contents(module, where, strict=strict), inner]

    def _value(self, value: Any, where: str, *, strict: bool) -> Any:
        """Return a value as JSON data; for one that cannot be serialised, raise if ``strict``, else return its type."""
        if type(value) in _PLAIN:
            return [type(value).__name__, repr(value)]
        if isinstance(value, nn.Module) and id(value) in self._paths:
            return ["module", self._paths[id(value)]]
        if isinstance(value, torch.Tensor):
            return self._tensor(value, where, strict)
        if isinstance(value, types.FunctionType):
            return ["function", self._function(value, where)]
        if isinstance(value, type):
            return ["class", self._class(value, created=True)]
        if isinstance(value, types.ModuleType):
            if home_of_module(value.__name__) == "user":
                return self._opaque(value, where, f"the module {value.__name__}", strict)
            return ["import", value.__name__]
        met = id(value), strict
        if met not in self._told:
            self._told[met] = ["itself"]
            self._alive.append(value)
            told = self._composed(value, where, strict)
            text = json.dumps(told)
            self._told[met] = told if len(text) < 100 else ["digest", hashlib.sha256(text.encode()).hexdigest()]
        return self._told[met]

    def _composed(self, value: Any, where: str, strict: bool) -> Any:
        def inner(part: Any, name: str = "") -> Any:
            return self._value(part, where + name, strict=strict)

        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        if isinstance(value, nn.Module):
            return self._outside(value, where, strict)
        if isinstance(value, enum.Enum):
            return [kind, value.name, inner(value.value)]
        if isinstance(value, _NAMED):
            return [kind, str(value)]
        for cls, name, parts in _MADE_OF_PARTS:
            if isinstance(value, cls):
                return [name, *map(inner, parts(value))]
        if isinstance(value, _BUILTINS):
            owner = getattr(value, "__self__", None)
            bound = owner is not None and not isinstance(owner, types.ModuleType | type)
            return ["builtin", str(getattr(value, "__module__", "")), value.__qualname__, inner(owner) if bound else ""]
        if isinstance(value, re.Pattern):
            return ["pattern", repr(value.pattern), int(value.flags)]
        if isinstance(value, OperatorBase | OpOverloadPacket):
            return ["operator", str(value)]
        if type(value).__module__ == "numpy" and hasattr(value, "tobytes") and not value.dtype.hasobject:
            return [kind, str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
        if isinstance(value, logging.Filterer):  # loggers, and handlers with their streams: neither is in a graph
            return ["logging"]
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict) and "__wrapped__" in attributes:
            return [kind, inner(attributes["__wrapped__"])]
        if not is_plain(type(value)):
            return self._opaque(value, where, "", strict)
        data = [kind, self._class(type(value))]
        if isinstance(value, dict | types.MappingProxyType):
            items = list(dict.items(value) if isinstance(value, dict) else value.items())
            if value is recorded_outputs():  # grows with every model class used in the process
                items = [(k, v) for k, v in items if k in self._kinds]
            pairs = [[inner(k), inner(v, f"[{k!r:.40}]")] for k, v in items]
            data.append(pairs if strict else sorted(pairs, key=repr))
            data.append(inner(getattr(value, "default_factory", None)))
        elif isinstance(value, set | frozenset):
            data.append(sorted(map(inner, value), key=repr))
        elif isinstance(value, list | tuple | collections.deque):
            data.append([inner(item, f"[{i}]") for i, item in enumerate(value)])
        elif isinstance(value, VALUES):
            data.append(next(base for base in VALUES if isinstance(value, base)).__repr__(value))
        state = {**(attributes or {}), **slots_of(value)}
        data.append([[name, inner(state[name], f".{name}")] for name in sorted(state.keys() - ABOUT_ORIGIN)])
        return data

    def _opaque(self, value: Any, where: str, what: str, strict: bool) -> Any:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        if strict:
            raise UnknownHoldingError(where, what or f"a {kind}")
        return ["some", kind]

    def _tensor(self, tensor: torch.Tensor, where: str, strict: bool) -> Any:
        owner = self._tensors.get(id(tensor))
        if owner is not None:
            return ["stored", owner]
        size = tensor.numel() * tensor.element_size()
        if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.device.type == "meta" or tensor.is_sparse:
            return self._opaque(tensor, where, f"a tensor without readable values ({type(tensor).__name__})", strict)
        if size > LARGEST_TENSOR:
            return self._opaque(tensor, where, f"a tensor of {size} bytes that is not a buffer", strict)
        digest = hashlib.sha256(raw_bytes(tensor)).hexdigest()
        return ["tensor", str(tensor.dtype), list(tensor.shape), tensor.requires_grad, digest]

    def _number(self, value: Any) -> int:
        self._alive.append(value)
        return self._numbers.setdefault(id(value), len(self._numbers))

    def _function(self, function: types.FunctionType, where: str) -> Any:
        if is_fixed(function):
            return f"{function.__module__}.{function.__qualname__}"
        if id(function) not in self._numbers:
            self._number(function)
            self._functions.append((function, where))
        return self._numbers[id(function)]

    def _class(self, cls: type, *, created: bool = False) -> Any:
        """Return a class's number, or its name if the class is identified by versions or by its library.

        ``created`` means that code merely mentions the class and may instantiate it; how a library's class is
        instantiated is up to the library.
        """
        if cls not in self._classes:
            home = home_of_module(cls.__module__)
            if (home == "fixed" and (created or not issubclass(cls, nn.Module))) or (home == "library" and created):
                return f"{cls.__module__}.{cls.__qualname__}"
            self._number(cls)
            self._classes[cls] = defined(cls)
            self._pending.append((cls, _CALLS | self._names))
            self._code.append(["class", self._numbers[id(cls)], cls.__module__, cls.__qualname__])
        if created and cls not in self._created and home_of_module(cls.__module__) == "user":
            self._created.add(cls)
            self._pending.append((cls, _CREATED))
        return self._numbers[id(cls)]

    def _reached(self) -> list[Any]:
        """Return all code that calls to the modules may reach, searching until nothing new is found."""
        while self._functions or self._pending or self._fresh:
            pending, self._pending = self._pending, []
            functions, self._functions = self._functions, []
            fresh, self._fresh = self._fresh, set()
            self._names |= fresh
            pending += [(cls, fresh) for cls in self._classes] if fresh else []
            for cls, names in pending:
                self._code += self._members(cls, names)
            self._code += [self._told_function(function, where) for function, where in functions]
        return self._code

    def _members(self, cls: type, names: Set[str]) -> list[Any]:
        """Return the definitions of these names in a class and its bases."""
        known, number = self._classes[cls], self._numbers[id(cls)]
        strict = home_of_module(cls.__module__) == "user"
        members: list[Any] = []
        for name in sorted((known.keys() & names) - _UNTOLD):
            for value in known[name]:
                for part in () if isinstance(value, _DESCRIPTORS) else parts_of(value):
                    if not (isinstance(part, types.FunctionType) and is_fixed(part)):
                        told = self._value(part, f"{cls.__qualname__}.{name}", strict=strict)
                        members.append([number, name, told])
        return members

    def _told_function(self, function: types.FunctionType, where: str) -> Any:
        """Return a function's code, and the values that it reaches: defaults, closure, and globals by name.

        For a module, only the members that the function mentions are recorded.
        """
        home, code = home_of(function), function.__code__
        names = names_of(code) if home != "fixed" else ()
        self._fresh |= set(names) - self._names
        strict = home == "user"
        label = f"{function.__module__}.{function.__qualname__}"
        outside = sorted(_OUTSIDE & set(names)) if strict else ()
        if outside:
            raise UnknownHoldingError(label, f"a value from {outside[0]}")
        parts = [
            self._value(vars(function), where, strict=strict) if vars(function) else None,
            function.__name__,
            self._value(function.__defaults__, where, strict=strict),
            self._value(function.__kwdefaults__, where, strict=strict),
            [
                self._value(value, f"{label}: {name}", strict=strict) if filled else ["empty"]
                for name, filled, value in closure_of(function)
            ],
        ]
        reached: dict[str, Any] = {}
        entered: set[int] = set()

        def reach(name: str, value: Any) -> None:
            if name in reached or name == OF_A_PROCESS:
                return
            if not isinstance(value, types.ModuleType):
                reached[name] = self._value(value, f"{label}: {name}", strict=strict)
            elif id(value) not in entered:
                entered.add(id(value))
                reached[name] = ["import", value.__name__]
                inside, fixed = vars(value), home_of_module(value.__name__) == "fixed"
                for part in names:
                    if part in inside and (not fixed or is_foreign(inside[part])):
                        reach(f"{name}.{part}", inside[part])

        for name in names:
            if name in function.__globals__:
                reach(name, function.__globals__[name])
        return ["code", self._numbers[id(function)], label, digest_of(code), parts, sorted(reached.items())]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


_MODULE = frozenset(vars(nn.Module()))
"""Attributes that every module has: tables of tensors, modules and hooks, and its mode."""

_UNTOLD_NAMES = """
__dict__ __weakref__ __module__ __annotations__ __doc__ __slots__ __abstractmethods__ __firstlineno__
__static_attributes__ __qualname__ __annotate__ __annotate_func__ _abc_impl
"""
_UNTOLD = frozenset(_UNTOLD_NAMES.split())
