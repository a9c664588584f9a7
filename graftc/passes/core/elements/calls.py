"""Represent calls to a live model's elements as text: tensors are replaced by numbers, other arguments are kept."""

from __future__ import annotations

import json
import re
from collections import UserDict
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, takewhile
from typing import Any

import torch
from torch import Tensor, nn

from graftc.passes.core.elements.behind import FollowingCall, ResultNumber, function_of
from graftc.passes.core.elements.layer_cache import cache_among, describe, stand_in
from graftc.passes.core.elements.tables import is_table
from graftc.passes.core.ir.shapes import DTYPE_NAMES, DTYPES
from graftc.specs.errors.diagnostics import GraftError

_PLAIN = (bool, int, float, str)


@dataclass(frozen=True)
class CallStructure:
    """A call's arguments as text, equal for two calls that differ only in their tensors.

    Attributes:
        text: JSON of the positional arguments, the keyword arguments, the operations on the result, and the decisions
            based on tensor values; the last two are omitted if empty.
    """

    text: str

    @classmethod
    def of(
        cls,
        path: str,
        module: nn.Module,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        steps: Sequence[FollowingCall] = (),
    ) -> tuple[CallStructure, list[Tensor]]:
        """Return a call's structure, and its tensors in order; a tensor that occurs twice is listed once.

        Args:
            path: the module's path, for messages.
            module: the module that is called.
            args, kwargs: the call's arguments.
            steps: operations on the result that are part of the call.

        Raises:
            GraftError: GC031 for an argument that is not a tensor, a plain value, a container of these, or a cache that
                only grows; also for a table that is passed twice.
        """
        tensors: dict[int, tuple[int, Tensor]] = {}
        tables: set[int] = set()
        cache = cache_among(args, kwargs)

        def numbered(tensor: Tensor) -> int:
            return tensors.setdefault(id(tensor), (len(tensors), tensor))[0]

        def described(value: Any) -> Any:
            if isinstance(value, Tensor):
                return {"tensor": numbered(value)}
            if value is not None and value is cache:
                with suppress(TypeError):
                    return {"cache": describe(value, module, numbered)}
            if value is None or isinstance(value, _PLAIN):
                return {"value": value}
            if isinstance(value, ResultNumber):
                return {"result": value.number}
            if steps and isinstance(value, torch.dtype):
                return {"dtype": DTYPE_NAMES[value]}
            if steps and isinstance(value, slice):
                return {"slice": [described(part) for part in (value.start, value.stop, value.step)]}
            if steps and value is Ellipsis:
                return {"ellipsis": None}
            if type(value) in (tuple, list):
                return {type(value).__name__: [described(item) for item in value]}
            if is_table(value):
                if id(value) in tables:
                    raise GraftError("GC031", "a layer is called with the same table twice", hint="pass it once")
                tables.add(id(value))
                return {"table": [[key, described(item)] for key, item in value.items()]}
            if isinstance(value, dict) and all(isinstance(key, str) for key in value):
                return {"dict": [[key, described(item)] for key, item in value.items()]}
            hint = "pass tensors, plain values, or tuples, lists and dicts of these"
            raise GraftError("GC031", f"{path} is called with a {type(value).__name__}", hint=hint)

        parts = [described(tuple(args)), described(kwargs)]
        if steps:
            parts.append([[step.name, described(step.args), described(dict(step.kwargs))] for step in steps])
        return cls(json.dumps(parts)), [tensor for _, tensor in tensors.values()]

    def build(self, module: nn.Module, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments for a call of ``module`` with these tensors."""
        args, kwargs = _parsed(self.text)[:2]
        return _built(args, module, tensors), _built(kwargs, module, tensors)

    def finish(self, result: Any, module: nn.Module, tensors: Sequence[Tensor]) -> Any:
        """Return the result of the call, given the module's result."""
        results = [result]
        for name, args, kwargs in _parsed(self.text)[2] if self.goes_on else ():
            step = FollowingCall(function_of(name), _built(args, module, tensors), _built(kwargs, module, tensors))
            results.append(step.run(results))
        return results[-1]

    @property
    def goes_on(self) -> bool:
        """Whether the call includes operations on the module's result."""
        return any(_parsed(self.text)[2:3])

    def deciding(self, decisions: Mapping[str, Sequence[bool]]) -> CallStructure:
        """Return the same call with different decisions based on tensor values.

        Args:
            decisions: the decisions in order, by mode: "train", "eval".
        """
        args, kwargs, *rest = _parsed(self.text)
        steps = rest[0] if rest else []
        taken = {mode: list(each) for mode, each in decisions.items() if each}
        parts = [args, kwargs, *([steps] if steps or taken else []), *([taken] if taken else [])]
        return CallStructure(json.dumps(parts))

    @property
    def undecided(self) -> CallStructure:
        """The call without its decisions."""
        return self.deciding({}) if self.decides else self

    def decisions(self, mode: str) -> tuple[bool, ...]:
        """Return the decisions based on tensor values in a mode, in order."""
        return tuple(_parsed(self.text)[3].get(mode, ())) if self.decides else ()

    @property
    def decides(self) -> bool:
        """Whether the call makes decisions based on tensor values; it then returns the values along with the result."""
        return len(_parsed(self.text)) > 3

    @property
    def boxed(self) -> bool:
        """Whether the call returns more than the result."""
        return self.cached or self.tabled or self.decides

    @property
    def cached(self) -> bool:
        """Whether a cache is among the arguments; its new contents are returned along with the result."""
        return '{"cache": ' in self.text

    @property
    def tabled(self) -> bool:
        """Whether a table is among the arguments; entries added to it are returned along with the result."""
        return '{"table": ' in self.text


def _built(node: dict[str, Any], module: nn.Module, tensors: Sequence[Tensor]) -> Any:
    """Return the value that a description represents; see `CallStructure.of`."""
    ((kind, content),) = node.items()

    def inner(item: dict[str, Any]) -> Any:
        return _built(item, module, tensors)

    readers: dict[str, Callable[[], Any]] = {
        "tensor": lambda: tensors[content],
        "value": lambda: content,
        "cache": lambda: stand_in(module, content, tensors),
        "result": lambda: ResultNumber(content),
        "dtype": lambda: DTYPES[content],
        "slice": lambda: slice(*map(inner, content)),
        "ellipsis": lambda: Ellipsis,
        "dict": lambda: {key: inner(item) for key, item in content},
        "table": lambda: UserDict({key: inner(item) for key, item in content}),
        "tuple": lambda: tuple(map(inner, content)),
        "list": lambda: list(map(inner, content)),
    }
    return readers[kind]()


@lru_cache(maxsize=256)
def _parsed(text: str) -> Any:
    return json.loads(text)


CALLS = "graftc_calls"
"""The flag that describes which elements a graph calls, and how."""


def calls_in(flags: Iterable[tuple[str, Any]]) -> dict[str, CallStructure]:
    """Return the structure of each element's call, by path, from a graph's flags; empty for a model's own graph."""
    return next((read_calls(str(value)) for name, value in flags if name == CALLS), {})


def innermost(path: str, elements: Collection[str]) -> str:
    """Return the innermost element that contains the module at a path, or an empty string."""
    while path and path not in elements:
        path = path.rpartition(".")[0]
    return path


def elements_in(flags: Iterable[tuple[str, Any]]) -> tuple[str, ...]:
    """Return the paths of the elements that a graph with these flags calls; empty for a model's own graph.

    Each element is called separately.
    """
    return tuple(calls_in(flags))


def input_name(path: str, index: int) -> str:
    """Return the name of the graph input for an element's tensor; all its characters are valid in parameter names."""
    name = re.sub(r"\W", lambda match: f"_{ord(match[0]):x}_", path.replace(".", "__"))
    return f"{name}__{index}"


def input_names(path: str, known: Container[str]) -> list[str]:
    """Return the names of the graph inputs for an element's tensors, in order, up to the first not in ``known``."""
    return list(takewhile(known.__contains__, (input_name(path, index) for index in count())))


def write_calls(calls: Iterable[tuple[str, CallStructure]]) -> str:
    """Return the value of the flag `CALLS`: elements grouped by the structure of their calls."""
    by_structure: dict[str, list[str]] = {}
    for path, structure in calls:
        by_structure.setdefault(structure.text, []).append(path)
    return json.dumps([[text, paths] for text, paths in by_structure.items()])


@lru_cache(maxsize=64)
def read_calls(text: str) -> dict[str, CallStructure]:
    """Return the structure of each element's call, by the element's path."""
    return {path: CallStructure(structure) for structure, paths in json.loads(text) for path in paths}
