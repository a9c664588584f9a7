"""What torch records about tensors and their storage without a public name for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T", bound=Tensor)


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor has been written to in place; 0 for those of inference mode, which do not count it."""
    return 0 if tensor.is_inference() else tensor._version


def is_view(tensor: Tensor) -> bool:
    """Return whether autograd knows a tensor as a view of another one."""
    return tensor._base is not None


def storage_key(tensor: Tensor) -> int:
    """Return what identifies the storage of a tensor, also of one without values, whose address is always 0."""
    key: int = tensor.untyped_storage()._cdata
    return key


def storage_sizes(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Return the number of bytes of each storage of some tensors by its `storage_key`."""
    return {storage_key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}


def wrapper(cls: type[T], shape: Iterable[int], dtype: torch.dtype, device: torch.device, **options: Any) -> T:
    """Return a tensor of a subclass that has a type and no storage of its own.

    torch's guide to subclasses names no other way.
    """
    tensor: T = Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device=device, **options)
    return tensor
