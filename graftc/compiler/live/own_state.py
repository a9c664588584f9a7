"""Copy buffers to protect a source model's tensors while its Python code runs, and write back replaced buffers."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from graftc.compat.modules import buffers_of
from graftc.compiler.resolve.untie import sharing_copy


def copies(tensors: Collection[Tensor]) -> list[Tensor]:
    """Return copies of tensors; copies share memory with one another if the tensors do."""
    with torch.inference_mode(False):
        return copy.deepcopy([tensor.detach() for tensor in tensors])


def with_own_buffers(model: nn.Module) -> nn.Module:
    """Return a copy of a model that has its own buffers and shares the storage of parameters with the source."""
    buffers = list(model.buffers())
    own: nn.Module = sharing_copy(model, dict(zip(map(id, buffers), copies(buffers), strict=True)))
    return own


@contextmanager
def written_in_place(module: nn.Module) -> Iterator[None]:
    """Write replacements for a module's buffers into the original buffers when the module's call ends, as a graph does.

    A replacement with a different shape or dtype is left alone: like a longer position table, it serves only this call.
    """
    tables = [buffers_of(each) for each in module.modules()]
    before = [(table, name, buffer) for table in tables for name, buffer in table.items() if buffer is not None]

    def write(*_: object) -> None:
        for table, name, buffer in before:
            now = table.get(name)
            if now is not None and now is not buffer and (now.shape, now.dtype) == (buffer.shape, buffer.dtype):
                with torch.no_grad():
                    buffer.copy_(now)
                table[name] = buffer

    handle = module.register_forward_hook(write)
    try:
        yield
    finally:
        handle.remove()
