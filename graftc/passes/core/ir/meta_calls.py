"""Operator calls on the meta device with concrete sizes, for verifying graphs."""

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
        mixed: the dtypes that `mixed_product` returns.
        result: the result of the call; None if it failed.
        error: the exception that the call raised.
    """

    mixed: str
    result: Any = None
    error: Exception | None = None


_OUTCOMES: dict[Any, MetaCall] = {}
_TENSORS: dict[Any, Tensor] = {}
_MOST = 20_000
"""The maximum number of cached calls; graphs of one model, and of similar models, make the same calls."""


class MetaCalls:
    """Makes calls on the meta device, each distinct call only once, since identical layers make the same calls.

    Args:
        sizes: evaluates symbolic sizes.

    Attributes:
        values: values by node; tensors of the same shape, strides and dtype are the same object.
    """

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        self.values: dict[fx.Node, Any] = {}
        self._concrete: dict[int, Any] = {}
        self._alike: set[tuple[int, int]] = set()

    def concrete(self, value: Any) -> Any:
        """Return a graph's value with concrete sizes.

        Values are cached by identity, since the graph keeps them alive.
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
        """Return the one object that represents all tensors of the same shape, strides and dtype."""
        if isinstance(value, Tensor):
            return _TENSORS.setdefault((value.dtype, value.shape, value.stride()), value)
        return type(value)(map(self._one, value)) if type(value) in (list, tuple) else value

    def outcome(self, node: fx.Node) -> MetaCall:
        """Return the outcome of a node's call."""
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
        """Return an argument as a cache key: equal for tensors of the same shape, strides and dtype."""
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
        """Return whether two values have the same shapes and dtypes."""
        known = (id(value), id(expected))
        if known not in self._alike and _kind(value) == _kind(expected):
            self._alike.add(known)
        return known in self._alike


_META = torch.device("meta")


def mixed_product(target: Any, args: Sequence[Any]) -> str:
    """Return the dtypes of a product's operands if they differ, or an empty string.

    Kernels reject such products, but the meta device accepts them.
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
    """Return what `alike` compares: shapes, dtypes and integers, but not the values of floats."""
    return float if isinstance(value, float) else plain(value)


def plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (str(value.dtype), tuple(value.shape))
    if isinstance(value, list | tuple):
        return tuple(plain(v) for v in value)
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return value
