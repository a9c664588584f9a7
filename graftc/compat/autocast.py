"""Products that transformers' models keep from autocast, traced as what autocast leaves alone.

Before 5.15, the angles of rotary positions are products of a column and a row, in a region without autocast. A trace
runs without autocast, so that it does not show such regions, and a graph would round the positions as all products.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_NAME = "maybe_autocast"
"""The function of transformers that begins such a region, which model code imports by its name."""
_PRODUCTS = frozenset({torch.matmul, Tensor.matmul, Tensor.__matmul__})


class _Regions(TorchFunctionMode):
    """Computes products of columns and rows elementwise, which gives the same bits."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS and not kwargs and len(args) == 2 and _is_outer(*args):
            return args[0] * args[1]
        return func(*args, **(kwargs or {}))


def _is_outer(left: Tensor, right: Tensor) -> bool:
    """Return whether a product has a single term for each entry."""
    if left.dim() < 2 or right.dim() < 2:
        return False
    sizes: tuple[object, ...] = (left.shape[-1], right.shape[-2])
    return all(isinstance(size, int) and size == 1 for size in sizes)  # others may be symbols


@contextmanager
def regions_without_autocast() -> Iterator[None]:
    """Trace products of columns and rows in regions without autocast elementwise, while the block runs."""
    from transformers.utils import generic

    begins: Any = getattr(generic, _NAME, None)

    def region(device_type: str, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]:
        entered: AbstractContextManager[Any] = begins(device_type, *args, **kwargs)
        off = kwargs.get("enabled", args[1] if len(args) > 1 else True) is False
        return _Regions() if off and not isinstance(entered, torch.autocast) else entered

    with ExitStack() as stack:
        for module in list(sys.modules.values()) if begins is not None else ():
            if getattr(module, "__dict__", {}).get(_NAME) is begins:
                stack.enter_context(mock.patch.object(module, _NAME, region))
        yield
