"""A packed weight as a tensor: its sizes and types are known, its values are made when something computes with them."""

from __future__ import annotations

import copy
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
        parts: what is stored.
        read: gives the whole value of a part; where parts are sharded over processes, all of them have to call it.
    """

    own: PackedType
    parts: tuple[Tensor, ...]
    read: Callable[[Tensor], Tensor]

    @staticmethod
    def __new__(
        cls, own: PackedType, parts: Sequence[Tensor], read: Callable[[Tensor], Tensor] = Tensor.detach
    ) -> PackedTensor:
        """See the class."""
        found: PackedTensor = Tensor._make_wrapper_subclass(
            cls, own.shape, strides=own.strides, dtype=own.dtype, device=parts[0].device
        )
        found.own, found.parts, found.read = own, tuple(parts), read
        return found

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PackedTensor({self.own.packing.text!r}, {list(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedTensor:
        return PackedTensor(self.own, [copy.deepcopy(part, memo) for part in self.parts], self.read)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, kinds: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] = MappingProxyType({})
    ) -> Any:
        """Make the values, but where nothing reads them."""
        if func is aten.detach.default:
            (tensor,) = args
            return cls(tensor.own, tensor.parts, tensor.read)
        args, kwargs = pytree.tree_map_only(PackedTensor, dense, (args, dict(kwargs)))
        return func(*args, **kwargs)


def dense(tensor: Tensor) -> Tensor:
    """The values of a tensor: those of a packed one are made anew, any other is returned as it is."""
    if not isinstance(tensor, PackedTensor):
        return tensor
    return tensor.own.value([tensor.read(part) for part in tensor.parts])
