"""Whole values of tensors that may be sharded over processes."""

from __future__ import annotations

from torch import Tensor


def gathered(tensor: Tensor) -> Tensor:
    """The whole value of a tensor, detached.

    A tensor that is sharded over processes (a ``DTensor``, as FSDP2 has them) is gathered, so every process of its mesh
    has to call this; any other tensor is returned as it is, not copied.
    """
    gather = getattr(tensor, "full_tensor", None)
    return tensor.detach() if gather is None else gather().detach()


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor: its part of one that is sharded, any other as it is."""
    part = getattr(tensor, "to_local", None)
    return tensor if part is None else part()


def copy_whole(own: Tensor, value: Tensor) -> None:
    """Copy a whole value into a tensor; into one that is sharded, each process copies its part."""
    mesh = getattr(own, "device_mesh", None)
    if mesh is None:
        own.copy_(value)
        return
    from torch.distributed.tensor import distribute_tensor

    own.copy_(distribute_tensor(value.to(own.device, own.dtype), mesh, own.placements))  # type: ignore[attr-defined]
