"""Offload kept activations to host memory while the device continues to compute.

Copies run on their own stream. When a tensor is requested, the tensors sent just before it are fetched as well, since
the backward pass reads tensors in reverse order.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection
from functools import cache
from typing import Any

import torch
from torch import Tensor

from graftc.compat.tensors import storage_key

LEAST = 2**20
"""The size of the smallest tensor to offload, in bytes; smaller ones are not worth the time."""

AHEAD = 2
"""The number of tensors to fetch ahead of the requested one."""


class StreamCopies:
    """Copies tensors between an accelerator and the host, on a stream of its own.

    Args:
        device: the accelerator.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.Stream(device)

    def away(self, tensor: Tensor) -> Any:
        """Start a copy to pinned memory, which runs after the work queued on the device so far."""
        host_copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, pin_memory=True)
        self._stream.wait_stream(torch.accelerator.current_stream(self._device))
        with self._stream:
            host_copy.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)  # its memory must not be reused before it has been read
        return host_copy

    def fetch(self, sent: Any) -> Any:
        """Start a copy back to the device, and return it with an event that marks its completion."""
        with self._stream:
            fetched = sent.to(self._device, non_blocking=True)
        return fetched, self._stream.record_event()

    def arrived(self, fetched: Any) -> Tensor:
        """Return the tensor, after making the current stream wait for the copy."""
        tensor: Tensor
        tensor, event = fetched
        stream = torch.accelerator.current_stream(self._device)
        stream.wait_event(event)
        tensor.record_stream(stream)
        return tensor


class _Sent:
    """A tensor that has been offloaded."""

    __slots__ = ("__weakref__", "before", "fetched", "sent")

    def __init__(self, sent: Any, before: _Sent | None) -> None:
        self.sent: Any = sent
        self.fetched: Any = None
        self.before = None if before is None else weakref.ref(before)


class Offload:
    """Saved-tensor hooks that offload tensors.

    Args:
        copies: the object that copies between the device and the host.
    """

    def __init__(self, copies: StreamCopies) -> None:
        self._copies = copies
        self._last: weakref.ref[_Sent] | None = None

    def pack(self, own: Collection[int], tensor: Tensor) -> Any:
        """Offload a tensor, unless it is small, on the CPU, or the model's own (its storage is in ``own``)."""
        storage = tensor.untyped_storage()
        if storage.nbytes() < LEAST or storage_key(tensor) in own or tensor.device.type == "cpu":
            return tensor
        before = None if self._last is None else self._last()
        sent = _Sent(self._copies.away(tensor), before)
        self._last = weakref.ref(sent)
        return sent

    def unpack(self, packed: Any) -> Tensor:
        """Return the tensor, and start fetching those that will be requested next."""
        if isinstance(packed, Tensor):
            return packed
        one: _Sent | None = packed
        for _ in range(1 + AHEAD):
            if one is None:
                break
            if one.fetched is None:
                one.fetched = self._copies.fetch(one.sent)
            one = None if one.before is None else one.before()
        return self._copies.arrived(packed.fetched)


@cache
def offload_of(device: torch.device) -> Offload:
    """Return the hooks that offload an accelerator's tensors."""
    return Offload(StreamCopies(device))
