"""Properties of tensors and their storage for which torch has no public name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T", bound=Tensor)


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor has been written to in place; 0 for inference tensors, which do not count writes."""
    return 0 if tensor.is_inference() else tensor._version


def is_view(tensor: Tensor) -> bool:
    """Return whether autograd tracks a tensor as a view of another one."""
    return tensor._base is not None


def storage_key(tensor: Tensor) -> int:
    """Return the identity of a tensor's storage, even for a tensor without values, whose address is always 0."""
    key: int = tensor.untyped_storage()._cdata
    return key


def storage_sizes(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Return the size in bytes of each of the tensors' storages, by `storage_key`."""
    return {storage_key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}


def wrapper(cls: type[T], shape: Iterable[int], dtype: torch.dtype, device: torch.device, **options: Any) -> T:
    """Return a tensor of the subclass ``cls`` that has a type, but no storage of its own.

    torch's guide to subclasses describes no other way.
    """
    tensor: T = Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device=device, **options)
    return tensor
