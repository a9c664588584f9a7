"""Tensors that are sharded over processes: how their whole values are read and written.

FSDP2 makes a parameter a ``DTensor`` outside of forward and backward passes. Gathering one is collective: every process
of its mesh has to take part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a ``DTensor``."""
    return hasattr(tensor, "full_tensor")


def is_unit(module: nn.Module) -> bool:
    """Whether FSDP2 has sharded a module as a unit."""
    return hasattr(type(module), "reshard")


def sharded_modules(root: nn.Module) -> Iterator[nn.Module]:
    """The modules of a tree that FSDP2 has sharded as units."""
    return filter(is_unit, root.modules())


def computes_in(unit: nn.Module) -> torch.dtype | None:
    """The type that FSDP2's `MixedPrecisionPolicy` casts a unit's parameters to; None where it leaves them."""
    found = getattr(unit, "_get_fsdp_state", lambda: None)()
    dtype = getattr(getattr(found, "_mp_policy", None), "param_dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else None


@dataclass(frozen=True)
class Spread:
    """A training over several processes.

    Attributes:
        processes: how many.
        sharded: whether tensors are sharded over them; otherwise each has a whole model.
    """

    processes: int
    sharded: bool

    @classmethod
    def of(cls, root: nn.Module) -> Spread | None:
        """That of a tree of modules; None where there is one process, which holds all."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        processes = torch.distributed.get_world_size() if distributed else 1
        sharded = distributed and any(True for _ in sharded_modules(root))
        return cls(processes, sharded) if processes > 1 or sharded else None


def computes_on(unit: nn.Module) -> str | None:
    """The kind of device on which FSDP2 lets a unit compute, wherever it keeps the shards; None where none is seen."""
    meshes = (tensor.device_mesh for tensor in unit.parameters() if is_sharded(tensor))  # type: ignore[attr-defined]
    mesh = next(meshes, None)
    return None if mesh is None else str(mesh.device_type)


def gathered(tensor: Tensor) -> Tensor:
    """The whole value of a tensor, detached and on its device.

    A sharded tensor is gathered; any other one is returned as it is, not copied.
    """
    return whole(tensor.detach())


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor: its part of one that is sharded, any other as it is."""
    part = getattr(tensor, "to_local", None)
    return tensor if part is None else part()


def whole(tensor: Tensor) -> Tensor:
    """The same with its gradient: each process is given the whole one, and keeps that of its part."""
    if not is_sharded(tensor):
        return tensor
    device, mesh = tensor.device, tensor.device_mesh  # type: ignore[attr-defined]
    if device.type != mesh.device_type:  # offloaded, where the processes of this mesh cannot reach it
        tensor = tensor.to(mesh.device_type)
    made: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return made.to(device)


def copy_whole(own: Tensor, value: Tensor, source: int | None = 0) -> None:
    """Copy a whole value into a tensor; into one that is sharded, each process copies its part.

    Args:
        own: is written to.
        value: of the same shape.
        source: whose value counts, a position in the mesh; None where all processes have the same, which then send
            each other nothing.
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
    """Inside, sharded tensors in tables of modules are whole, so that code that knows nothing of shards reads them.

    Args:
        tables: of parameters.
        write: what is written to them in place is put into the shards afterwards, and each has its whole gradient.
            Otherwise they are for reading, and what is computed of them has gradients by the shards.
    """
    places = [(table, name) for table in tables for name, t in table.items() if t is not None and is_sharded(t)]
    held = [table[name] for table, name in places]
    made = [_writable(tensor) if write else whole(tensor) for tensor in held]
    versions = [tensor._version for tensor in made]
    try:
        for (table, name), tensor in zip(places, made, strict=True):
            table[name] = tensor
        yield
    finally:
        for (table, name), tensor in zip(places, held, strict=True):
            table[name] = tensor
    if write:
        with torch.no_grad():
            for tensor, own, version in zip(made, held, versions, strict=True):
                if tensor._version != version:
                    copy_whole(own, tensor, source=None)


def _writable(tensor: Tensor) -> nn.Parameter:
    made = nn.Parameter(gathered(tensor).clone(), requires_grad=tensor.requires_grad)
    if tensor.grad is not None:
        made.grad = gathered(tensor.grad)
    return made
