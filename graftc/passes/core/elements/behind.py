"""Operations that a model's Python code applies to an element's result and that can become part of its graph.

For example, if a loss over a vocabulary is in one graph with the head, logits can be computed a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

LOSS = functional.cross_entropy
"""The loss function that can end a sequence of such operations."""

FLATTENING = (Tensor.view, Tensor.reshape, Tensor.flatten, torch.reshape, torch.flatten)
"""Functions that may flatten rows into one axis."""

_IN_BETWEEN: tuple[Any, ...] = (
    Tensor.float,
    Tensor.to,
    Tensor.contiguous,
    Tensor.__getitem__,
    Tensor.mul,
    Tensor.div,
    Tensor.tanh,
    torch.mul,
    torch.div,
    torch.tanh,
    *FLATTENING,
)
_NAMES: dict[Any, str] = {
    function: f"{'Tensor' if getattr(Tensor, function.__name__, None) is function else 'torch'}.{function.__name__}"
    for function in (*_IN_BETWEEN, Tensor.select, Tensor.expand_as)
}
_NAMES[LOSS] = "cross_entropy"
_FUNCTIONS: dict[str, Any] = {name: function for function, name in _NAMES.items()}


@dataclass(frozen=True)
class ResultNumber:
    """A placeholder for the element's result (0), or for the result of a following step (1, 2, ...)."""

    number: int


@dataclass(frozen=True)
class FollowingCall:
    """A function call that follows an element.

    Attributes:
        function: a function for which `may_follow` returns True.
        args, kwargs: its arguments: tensors, plain values, types, slices and `ResultNumber`, in tuples and lists.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The function's name; see `function_of`."""
        return _NAMES[self.function]

    def run(self, results: Sequence[Any]) -> Any:
        """Call the function, with the results so far in place of `ResultNumber` placeholders."""
        return self.function(*put_in(self.args, results), **put_in(dict(self.kwargs), results))


def may_follow(function: Callable[..., Any]) -> bool:
    """Return whether a function may be called in a `FollowingCall`."""
    return function in _IN_BETWEEN or function is LOSS


def function_of(name: str) -> Any:
    """Return the function that has the given `FollowingCall.name`."""
    return _FUNCTIONS[name]


def put_in(value: Any, results: Sequence[Any]) -> Any:
    """Replace every `ResultNumber` in a value with the corresponding result."""
    if isinstance(value, ResultNumber):
        return results[value.number]
    if type(value) in (tuple, list):
        return type(value)(put_in(item, results) for item in value)
    return {key: put_in(item, results) for key, item in value.items()} if isinstance(value, dict) else value
