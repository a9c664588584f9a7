"""A packed weight as a tensor with known shape and dtype, whose values are computed when an operator reads them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from graftc.compat import pytree
from graftc.compat.tensors import wrapper
from graftc.passes.core.packing.packing import PackedType

aten = torch.ops.aten


class PackedTensor(Tensor):
    """The tensor that the Store returns for a packed weight.

    Each operator that reads it recomputes the values and returns plain tensors; callers that need the values more than
    once should call `dense`.

    Args:
        own: the type of the packed weight.
        parts: the stored tensors.
        read: a function that returns the whole value of a part; if parts are sharded across processes, all processes
            must call it.
    """

    own: PackedType
    parts: tuple[Tensor, ...]
    read: Callable[[Tensor], Tensor]

    @staticmethod
    def __new__(
        cls, own: PackedType, parts: Sequence[Tensor], read: Callable[[Tensor], Tensor] = Tensor.detach
    ) -> PackedTensor:
        """Create a tensor without values that has the weight's shape, dtype and strides."""
        tensor: PackedTensor = wrapper(cls, own.shape, own.dtype, parts[0].device, strides=own.strides)
        tensor.own, tensor.parts, tensor.read = own, tuple(parts), read
        return tensor

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PackedTensor({self.own.packing.text!r}, {list(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedTensor:
        return PackedTensor(self.own, [copy.deepcopy(part, memo) for part in self.parts], self.read)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, kinds: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] = MappingProxyType({})
    ) -> Any:
        """Call an operator with the values; ``detach`` does not need them and returns another packed tensor."""
        if func is aten.detach.default:
            (tensor,) = args
            return cls(tensor.own, tensor.parts, tensor.read)
        args, kwargs = pytree.tree_map_only(PackedTensor, dense, (args, dict(kwargs)))
        return func(*args, **kwargs)


def dense(tensor: Tensor) -> Tensor:
    """Return a tensor's values: those of a packed tensor are recomputed, any other tensor is returned unchanged."""
    if not isinstance(tensor, PackedTensor):
        return tensor
    return tensor.own.value([tensor.read(part) for part in tensor.parts])
