"""A packed weight as a tensor: its sizes and types are known, its values are made when something computes with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graftc.passes.core.packing.packing import PackedType

aten = torch.ops.aten


class PackedTensor(Tensor):
    """What the Store gives for a packed weight. Each operator that reads it makes the values anew, and gives plain
    tensors; whoever needs them more than once calls `dense`.

    Args:
        own: its type.
        device: where the values are made.
        make: makes them.
    """

    own: PackedType
    make: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, own: PackedType, device: torch.device, make: Callable[[], Tensor]) -> PackedTensor:
        """See the class."""
        found: PackedTensor = Tensor._make_wrapper_subclass(cls, own.shape, dtype=own.dtype, device=device)
        found.own, found.make = own, make
        return found

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PackedTensor({self.own.packing.text!r}, {list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, kinds: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] = MappingProxyType({})
    ) -> Any:
        """Make the values, but where nothing reads them."""
        if func is aten.detach.default:
            (tensor,) = args
            return cls(tensor.own, tensor.device, tensor.make)
        args, kwargs = pytree.tree_map_only(PackedTensor, dense, (args, dict(kwargs)))
        return func(*args, **kwargs)


def dense(tensor: Tensor) -> Tensor:
    """The values of a tensor: those of a packed one are made anew, any other is returned as it is."""
    return tensor.make() if isinstance(tensor, PackedTensor) else tensor
