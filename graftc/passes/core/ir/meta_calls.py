"""Calls of operators on the meta device, with numbers for sizes, which are used to verify graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graftc.passes.core.ir.cleaning import takes_device
from graftc.passes.core.ir.program import map_nodes
from graftc.passes.core.ir.shapes import Sizes


@dataclass
class MetaCall:
    """The outcome of a call on the meta device.

    Attributes:
        mixed: the types that `mixed_product` returns.
        result: the result of the call; None if it was refused.
        error: the exception with which it was refused.
    """

    mixed: str
    result: Any = None
    error: Exception | None = None


_OUTCOMES: dict[Any, MetaCall] = {}
_TENSORS: dict[Any, Tensor] = {}
_MOST = 20_000
"""Calls that are remembered: graphs of one model, and those of others like it, make the same ones."""


class MetaCalls:
    """Calls on the meta device, each kind made once: layers that are alike make the same calls.

    Args:
        sizes: the numbers for sizes.

    Attributes:
        values: values by node; values of one type are the same object.
    """

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        self.values: dict[fx.Node, Any] = {}
        self._concrete: dict[int, Any] = {}
        self._alike: set[tuple[int, int]] = set()

    def concrete(self, value: Any) -> Any:
        """Return a value of a graph with numbers for sizes.

        Values are looked up by identity, since the graph keeps them alive.
        """
        if id(value) not in self._concrete:
            self._concrete[id(value)] = self._new(value)
        return self._concrete[id(value)]

    def _new(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._one(torch.empty(self._sizes.shape(value), dtype=value.dtype, device=_META))
        if isinstance(value, list | tuple):
            return tuple(self._new(v) for v in value)
        return value if value is None or isinstance(value, bool | float) else self._sizes.size(value)

    def _one(self, value: Any) -> Any:
        """Return the one object for all values of a type."""
        if isinstance(value, Tensor):
            return _TENSORS.setdefault((value.dtype, value.shape, value.stride()), value)
        return type(value)(map(self._one, value)) if type(value) in (list, tuple) else value

    def outcome(self, node: fx.Node) -> MetaCall:
        """Return the outcome of the call of a node."""
        key = (node.target, self._key(node.args), self._key(node.kwargs))
        if key not in _OUTCOMES:
            if len(_OUTCOMES) >= _MOST:
                _OUTCOMES.clear()
                _TENSORS.clear()
            _OUTCOMES[key] = self._run(node)
        return _OUTCOMES[key]

    def _run(self, node: fx.Node) -> MetaCall:
        def number(value: Any) -> Any:
            return self._sizes.size(value) if isinstance(value, torch.SymInt) else value

        args, kwargs = map_nodes((node.args, dict(node.kwargs)), self.values.__getitem__)
        args, kwargs = fx.node.map_aggregate((args, kwargs), number)
        if takes_device(node.target):
            kwargs = {**kwargs, "device": _META}
        target: Any = node.target
        call = MetaCall(mixed_product(target, args))
        try:
            call.result = self._one(target(*args, **kwargs))
        except _REFUSALS as error:
            call.error = error.with_traceback(None)
        return call

    def _key(self, argument: Any) -> Any:
        """Return an argument as a key for calls: equal for values of one type, as far as the type is known."""
        if isinstance(argument, fx.Node):
            argument = self.values[argument]
            if isinstance(argument, Tensor):
                return (Tensor, argument.dtype, argument.shape, argument.stride())
        if isinstance(argument, list | tuple):
            return tuple(self._key(item) for item in argument)
        if isinstance(argument, dict):
            return tuple((name, self._key(item)) for name, item in argument.items())
        if isinstance(argument, slice):
            return (slice, self._key((argument.start, argument.stop, argument.step)))
        if isinstance(argument, torch.SymInt):
            argument = self._sizes.size(argument)
        return (type(argument), argument)

    def alike(self, value: Any, expected: Any) -> bool:
        """Return whether two values are of the same type."""
        known = (id(value), id(expected))
        if known not in self._alike and _kind(value) == _kind(expected):
            self._alike.add(known)
        return known in self._alike


_META = torch.device("meta")


def mixed_product(target: Any, args: Sequence[Any]) -> str:
    """Return the types of a product whose factors differ in type, or an empty string.

    Kernels refuse such products and the meta device accepts them.
    """
    if target not in _PRODUCTS:
        return ""
    dtypes = {arg.dtype for arg in args if isinstance(arg, Tensor)}
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)) if len(dtypes) > 1 else ""


_PRODUCTS = frozenset(
    getattr(torch.ops.aten, name).default
    for name in ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "convolution")
) | {getattr(torch.ops.aten, f"conv{n}d").default for n in (1, 2, 3)}
_REFUSALS = (ArithmeticError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)


def _kind(value: Any) -> Any:
    """Return the type of a value: sizes count, numbers computed from sizes by division and roots do not."""
    return float if isinstance(value, float) else plain(value)


def plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (str(value.dtype), tuple(value.shape))
    if isinstance(value, list | tuple):
        return tuple(plain(v) for v in value)
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return value
