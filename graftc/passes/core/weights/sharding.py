"""Read and write the full values of tensors that are sharded across processes.

Outside of forward and backward passes, FSDP2 replaces a parameter by a ``DTensor``. Gathering it is a collective
operation: every process in its mesh must take part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftc.compat.tensors import version_of


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a ``DTensor``."""
    return hasattr(tensor, "full_tensor")


def is_unit(module: nn.Module) -> bool:
    """Return whether FSDP2 has sharded a module as a unit."""
    return hasattr(type(module), "reshard")


def sharded_modules(root: nn.Module) -> Iterator[nn.Module]:
    """Return an iterator over the modules of a tree that FSDP2 has sharded as units."""
    return filter(is_unit, root.modules())


@dataclass(frozen=True)
class Spread:
    """The distribution of a training run across processes.

    Attributes:
        processes: number of processes.
        sharded: whether tensors are sharded across them; otherwise each process has a whole model.
    """

    processes: int
    sharded: bool

    @classmethod
    def of(cls, root: nn.Module) -> Spread | None:
        """Return the spread of a module tree; None if a single process holds everything unsharded."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        processes = torch.distributed.get_world_size() if distributed else 1
        sharded = distributed and any(True for _ in sharded_modules(root))
        return cls(processes, sharded) if processes > 1 or sharded else None


def computes_on(unit: nn.Module) -> str | None:
    """Return the device type on which an FSDP2 unit computes, regardless of where its shards are.

    None if the unit has no sharded parameter.
    """
    sharded: Any = filter(is_sharded, unit.parameters())
    return next((str(tensor.device_mesh.device_type) for tensor in sharded), None)


def gathered(tensor: Tensor) -> Tensor:
    """Return the full value of a tensor, detached and on its device.

    A sharded tensor is gathered; any other tensor is returned without a copy.
    """
    return whole(tensor.detach())


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor; any other tensor is returned unchanged."""
    part = getattr(tensor, "to_local", None)
    return tensor if part is None else part()


def whole(tensor: Tensor) -> Tensor:
    """Return the full value of a tensor, differentiably.

    In the backward pass, each process receives the full gradient and keeps the gradient of its part.
    """
    if not is_sharded(tensor):
        return tensor
    device, mesh = tensor.device, tensor.device_mesh  # type: ignore[attr-defined]
    if device.type != mesh.device_type:  # offloaded to a device on which this mesh cannot communicate
        tensor = tensor.to(mesh.device_type)
    full: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return full.to(device)


def copy_whole(own: Tensor, value: Tensor, source: int | None = 0) -> None:
    """Copy a full value into a tensor; if it is sharded, each process copies its part.

    Args:
        own: the tensor to write to.
        value: the full value, of the same shape.
        source: the process whose value is used, as its rank in the mesh; None if all processes have the same value, so
            that nothing is sent.
    """
    if not is_sharded(own):
        own.copy_(value)
        return
    from torch.distributed.tensor import distribute_tensor

    mesh = own.device_mesh  # type: ignore[attr-defined]
    placed = distribute_tensor(
        value.to(mesh.device_type, own.dtype),
        mesh,
        own.placements,  # type: ignore[attr-defined]
        src_data_rank=source,
    )
    own.copy_(placed.to(own.device))


@contextmanager
def all_whole(tables: Iterable[dict[str, Any]], *, write: bool) -> Iterator[None]:
    """Replace sharded tensors in module tables by full ones while the block runs, for code that does not handle shards.

    Args:
        tables: parameter tables of modules.
        write: whether to copy in-place changes into the shards afterwards; each tensor then has its full gradient.
            Otherwise the tensors are read-only, and results computed from them are differentiable with respect to the
            shards.
    """
    places = [(table, name) for table in tables for name, t in table.items() if t is not None and is_sharded(t)]
    shards = [table[name] for table, name in places]
    full = [_writable(tensor) if write else whole(tensor) for tensor in shards]
    versions = [version_of(tensor) for tensor in full]
    try:
        for (table, name), tensor in zip(places, full, strict=True):
            table[name] = tensor
        yield
    finally:
        for (table, name), tensor in zip(places, shards, strict=True):
            table[name] = tensor
    if write:
        with torch.no_grad():
            for tensor, own, version in zip(full, shards, versions, strict=True):
                if version_of(tensor) != version:
                    copy_whole(own, tensor, source=None)


def _writable(tensor: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(gathered(tensor).clone(), requires_grad=tensor.requires_grad)
    if tensor.grad is not None:
        parameter.grad = gathered(tensor.grad)
    return parameter
