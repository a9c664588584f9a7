"""How an element of a live model is called: its arguments, with tensors numbered and everything else as it is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from graftc.passes.core.elements.layer_cache import LayerCache, number_of, past_in
from graftc.specs.errors.diagnostics import GraftError

_PLAIN = (bool, int, float, str)


@dataclass(frozen=True)
class CallStructure:
    """The arguments of a call, as text: equal where two calls differ in their tensors alone.

    Attributes:
        text: JSON of the positional arguments and of the others.
    """

    text: str

    @classmethod
    def of(
        cls, path: str, module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[CallStructure, list[Tensor]]:
        """The structure of a call, and its tensors in order; one that comes twice is there once.

        Args:
            path: of the module, for messages.
            module: that is called.
            args, kwargs: what it is called with.

        Raises:
            GraftError: GC031 for an argument that is neither a tensor, nor a plain value, nor a container of these, nor
                a cache that only grows.
        """
        tensors: dict[int, tuple[int, Tensor]] = {}

        def numbered(tensor: Tensor) -> int:
            return tensors.setdefault(id(tensor), (len(tensors), tensor))[0]

        def described(value: Any) -> Any:
            if isinstance(value, Tensor):
                return {"tensor": numbered(value)}
            if hasattr(value, "update") and hasattr(value, "layers"):
                layer = number_of(module)
                try:
                    past = None if layer is None else past_in(value, layer)
                except TypeError:
                    layer = None
                if layer is not None:
                    return {"cache": [] if past is None else [numbered(tensor) for tensor in past]}
            if value is None or isinstance(value, _PLAIN):
                return {"value": value}
            if type(value) in (tuple, list):
                return {type(value).__name__: [described(item) for item in value]}
            if isinstance(value, dict) and all(isinstance(key, str) for key in value):
                return {"dict": [[key, described(item)] for key, item in value.items()]}
            hint = "a graph takes tensors, plain values, and tuples, lists and dicts of these"
            raise GraftError("GC031", f"{path} is called with a {type(value).__name__}", hint=hint)

        found = [described(tuple(args)), described(kwargs)]
        return cls(json.dumps(found)), [tensor for _, tensor in tensors.values()]

    def build(self, module: nn.Module, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call of a module with these tensors."""

        def made(node: dict[str, Any]) -> Any:
            ((kind, held),) = node.items()
            if kind == "tensor":
                return tensors[held]
            if kind == "value":
                return held
            if kind == "cache":
                return LayerCache(number_of(module), (tensors[held[0]], tensors[held[1]]) if held else None)
            if kind == "dict":
                return {key: made(item) for key, item in held}
            return (tuple if kind == "tuple" else list)(made(item) for item in held)

        args, kwargs = _parsed(self.text)
        return made(args), made(kwargs)

    @property
    def cached(self) -> bool:
        """Whether a cache is among the arguments: what is new in it comes out beside the result."""
        return '"cache": [' in self.text


@lru_cache(maxsize=256)
def _parsed(text: str) -> Any:
    return json.loads(text)


CALLS = "graftc_calls"
"""The flag that says which elements a graph calls, and how."""


def calls_in(flags: Iterable[tuple[str, Any]]) -> dict[str, CallStructure]:
    """The elements that a graph with these flags calls, by their paths, and how; none where it is a model's own."""
    return next((read_calls(str(value)) for name, value in flags if name == CALLS), {})


def elements_in(flags: Iterable[tuple[str, Any]]) -> tuple[str, ...]:
    """Paths of the elements that a graph with these flags calls, each by itself; none where it is a model's own."""
    return tuple(calls_in(flags))


def input_name(path: str, index: int) -> str:
    """The name of an element's tensor among the inputs of a graph."""
    return f"{path.replace('.', '__')}__{index}"


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
