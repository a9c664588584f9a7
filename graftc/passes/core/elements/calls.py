"""How an element of a live model is called: its arguments, with tensors numbered and everything else as it is."""

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
    """The arguments of a call, as text: equal where two calls differ in their tensors alone.

    Attributes:
        text: JSON of the positional arguments, of the others, of what is done to the result, and of what is decided by
            values; the last two are left out where there is nothing.
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
        """The structure of a call, and its tensors in order; one that comes twice is there once.

        Args:
            path: of the module, for messages.
            module: that is called.
            args, kwargs: what it is called with.
            steps: what is done to its result as a part of the call.

        Raises:
            GraftError: GC031 for an argument that is neither a tensor, nor a plain value, nor a container of these, nor
                a cache that only grows.
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
                    raise GraftError("GC031", "a layer is called with one table twice", hint="a graph takes it once")
                tables.add(id(value))
                return {"table": [[key, described(item)] for key, item in value.items()]}
            if isinstance(value, dict) and all(isinstance(key, str) for key in value):
                return {"dict": [[key, described(item)] for key, item in value.items()]}
            hint = "a graph takes tensors, plain values, and tuples, lists and dicts of these"
            raise GraftError("GC031", f"{path} is called with a {type(value).__name__}", hint=hint)

        found = [described(tuple(args)), described(kwargs)]
        if steps:
            found.append([[step.name, described(step.args), described(dict(step.kwargs))] for step in steps])
        return cls(json.dumps(found)), [tensor for _, tensor in tensors.values()]

    def build(self, module: nn.Module, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call of a module with these tensors."""
        args, kwargs = _parsed(self.text)[:2]
        return _built(args, module, tensors), _built(kwargs, module, tensors)

    def finish(self, result: Any, module: nn.Module, tensors: Sequence[Tensor]) -> Any:
        """What the call gives, for what the module gives."""
        results = [result]
        for name, args, kwargs in _parsed(self.text)[2] if self.goes_on else ():
            step = FollowingCall(function_of(name), _built(args, module, tensors), _built(kwargs, module, tensors))
            results.append(step.run(results))
        return results[-1]

    @property
    def goes_on(self) -> bool:
        """Whether something is done to the module's result."""
        return any(_parsed(self.text)[2:3])

    def deciding(self, decisions: Mapping[str, Sequence[bool]]) -> CallStructure:
        """Return the same call with other decisions by tensor values.

        Args:
            decisions: in order, by mode: "train", "eval".
        """
        args, kwargs, *rest = _parsed(self.text)
        steps = rest[0] if rest else []
        taken = {mode: list(each) for mode, each in decisions.items() if each}
        parts = [args, kwargs, *([steps] if steps or taken else []), *([taken] if taken else [])]
        return CallStructure(json.dumps(parts))

    @property
    def undecided(self) -> CallStructure:
        """This call with its decisions removed."""
        return self.deciding({}) if self.decides else self

    def decisions(self, mode: str) -> tuple[bool, ...]:
        """Return the decisions by tensor values in a mode, in order."""
        return tuple(_parsed(self.text)[3].get(mode, ())) if self.decides else ()

    @property
    def decides(self) -> bool:
        """Whether the call takes decisions by tensor values; these values come out beside the result."""
        return len(_parsed(self.text)) > 3

    @property
    def boxed(self) -> bool:
        """Whether more comes out than the result."""
        return self.cached or self.tabled or self.decides

    @property
    def cached(self) -> bool:
        """Whether a cache is among the arguments: what is new in it comes out beside the result."""
        return '{"cache": ' in self.text

    @property
    def tabled(self) -> bool:
        """Whether a table is among the arguments: what is put into it comes out beside the result."""
        return '{"table": ' in self.text


def _built(node: dict[str, Any], module: nn.Module, tensors: Sequence[Tensor]) -> Any:
    """A value out of its description; see `CallStructure.of`."""
    ((kind, held),) = node.items()

    def inner(item: dict[str, Any]) -> Any:
        return _built(item, module, tensors)

    readers: dict[str, Callable[[], Any]] = {
        "tensor": lambda: tensors[held],
        "value": lambda: held,
        "cache": lambda: stand_in(module, held, tensors),
        "result": lambda: ResultNumber(held),
        "dtype": lambda: DTYPES[held],
        "slice": lambda: slice(*map(inner, held)),
        "ellipsis": lambda: Ellipsis,
        "dict": lambda: {key: inner(item) for key, item in held},
        "table": lambda: UserDict({key: inner(item) for key, item in held}),
        "tuple": lambda: tuple(map(inner, held)),
        "list": lambda: list(map(inner, held)),
    }
    return readers[kind]()


@lru_cache(maxsize=256)
def _parsed(text: str) -> Any:
    return json.loads(text)


CALLS = "graftc_calls"
"""The flag that says which elements a graph calls, and how."""


def calls_in(flags: Iterable[tuple[str, Any]]) -> dict[str, CallStructure]:
    """The elements that a graph with these flags calls, by their paths, and how; none where it is a model's own."""
    return next((read_calls(str(value)) for name, value in flags if name == CALLS), {})


def innermost(path: str, elements: Collection[str]) -> str:
    """Return the innermost element that holds the module at a path; empty where none does."""
    while path and path not in elements:
        path = path.rpartition(".")[0]
    return path


def elements_in(flags: Iterable[tuple[str, Any]]) -> tuple[str, ...]:
    """Paths of the elements that a graph with these flags calls, each by itself; none where it is a model's own."""
    return tuple(calls_in(flags))


def input_name(path: str, index: int) -> str:
    """The name of an element's tensor among the inputs of a graph, of characters that a parameter's name may have."""
    name = re.sub(r"\W", lambda found: f"_{ord(found[0]):x}_", path.replace(".", "__"))
    return f"{name}__{index}"


def input_names(path: str, known: Container[str]) -> list[str]:
    """Return the names of an element's tensors among those of a graph's inputs, in order."""
    return list(takewhile(known.__contains__, (input_name(path, index) for index in count())))


def write_calls(calls: Iterable[tuple[str, CallStructure]]) -> str:
    """The value of `CALLS`: elements by the structure of their calls."""
    by_structure: dict[str, list[str]] = {}
    for path, structure in calls:
        by_structure.setdefault(structure.text, []).append(path)
    return json.dumps([[text, paths] for text, paths in by_structure.items()])


@lru_cache(maxsize=64)
def read_calls(text: str) -> dict[str, CallStructure]:
    """The structure of every element's call, by its path."""
    return {path: CallStructure(structure) for structure, paths in json.loads(text) for path in paths}
