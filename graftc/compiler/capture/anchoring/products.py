"""Cache the matrix products with stored weights that a model computes, so that equal products are computed once.

These products take most of the time of a forward pass. The same operator, applied to the same weight with operands
that are bit-identical and have the same memory layout, returns the same result, both in a graph that is compared with
the model and in the model itself in another mode.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from graftc.compat.tensors import version_of

aten = torch.ops.aten
_OPERATORS: Mapping[Any, Any] = {linear: aten.linear.default, torch.addmm: aten.addmm.default}
"""The graph operators for the functions that a model calls."""
_KEPT = frozenset(_OPERATORS.values())
_LEAST, _SHARE = 2**25, 100
"""The cache limit in bytes, and the divisor that yields a large model's higher limit from its parameter bytes."""

_Known = tuple[Sequence[Any], list[int], Tensor, int]
"""Operands with their versions, and a result with its version; writing to any of them invalidates the entry."""


class Products:
    """A cache for the results of matrix products with a model's tensors.

    Args:
        model: the model whose parameters count as stored.
    """

    def __init__(self, model: nn.Module) -> None:
        self._stored = _addresses(model)
        self._known: dict[Any, list[_Known]] = defaultdict(list)
        self._order: deque[tuple[Any, int]] = deque()
        self._bytes, size = 0, sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
        self._most = max(_LEAST, size // _SHARE)

    def fit(self, model: nn.Module) -> bool:
        """Return whether the results still apply to a model, which may have been moved or have other parameters."""
        return self._stored == _addresses(model)

    def keep(self, operator: Any, args: Sequence[Any], result: Tensor) -> None:
        """Store the result of a call if it is a product with a stored tensor."""
        if operator in _KEPT and _is_plain(result) and (key := self._key(operator, args)) is not None:
            self._known[key].append((args, _versions(args), result, version_of(result)))
            self._order.append((key, result.numel() * result.element_size()))
            self._bytes += self._order[-1][1]
            while self._bytes > self._most and len(self._order) > 1:  # the oldest result of a key is its first
                first, size = self._order.popleft()
                self._known[first].pop(0)
                self._bytes -= size

    def again(self, operator: Any, args: Sequence[Any]) -> Tensor | None:
        """Return the result of a call if the same call was made before, otherwise None."""
        if operator not in _KEPT or (key := self._key(operator, args)) is None:
            return None
        for before, versions, result, version in self._known.get(key, ()):
            written = versions != _versions(before) or version != version_of(result)
            if not written and all(map(_same, before, args)):
                return result.clone()
        return None

    def _key(self, operator: Any, args: Sequence[Any]) -> Any:
        """Return a key that a call shares with calls that may be the same.

        Return None if an operand is not a plain tensor, or if no operand is a stored tensor.
        """
        if not all(map(_is_plain, args)):
            return None
        stored = [arg.data_ptr() if arg.data_ptr() in self._stored else 0 for arg in args]
        return (operator, *stored, *((a.dtype, a.device, a.shape, a.stride()) for a in args)) if any(stored) else None


class Computing(TorchFunctionMode):
    """A function mode in which a model reuses known products and stores the others.

    Args:
        products: the products of the model.
    """

    def __init__(self, products: Products) -> None:
        super().__init__()
        self._products = products

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operator = None if kwargs else _OPERATORS.get(func)
        if operator is None:
            return func(*args, **(kwargs or {}))
        operands = args[:-1] if args[-1] is None else args  # leave out a missing bias
        known = self._products.again(operator, operands)
        if known is not None:
            return known
        result = func(*args)
        self._products.keep(operator, operands, result)
        return result


_KNOWN: WeakKeyDictionary[nn.Module, Products] = WeakKeyDictionary()


def products_of(model: nn.Module) -> Products:
    """Return a model's product cache, which lives as long as the model.

    It is kept because the model's next signature is compared on the same texts.
    """
    products = _KNOWN.get(model)
    if products is None or not products.fit(model):
        products = _KNOWN[model] = Products(model)
    return products


def _addresses(model: nn.Module) -> set[int]:
    return {tensor.data_ptr() for tensor in model.parameters() if _is_plain(tensor)}


def _is_plain(tensor: Any) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_inference() and tensor.layout is torch.strided


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() or torch.equal(a, b)  # shapes and strides are equal here


def _versions(args: Sequence[Any]) -> list[int]:
    return [version_of(arg) for arg in args]
