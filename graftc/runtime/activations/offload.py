"""Offloading of what is kept to the host's memory while the device continues to compute.

Copies have a stream of their own. On the way back, the tensors that were sent just before the requested one are fetched
as well, since the backward pass reads tensors in the opposite order.
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
"""Bytes of the smallest tensor that is offloaded; smaller ones are not worth the time."""

AHEAD = 2
"""Number of tensors that are fetched before they are requested."""


class StreamCopies:
    """Copies between an accelerator and the host, on a stream of their own.

    Args:
        device: the accelerator.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.Stream(device)

    def away(self, tensor: Tensor) -> Any:
        """Start a copy to pinned memory, after the work that the device has been given so far."""
        host_copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, pin_memory=True)
        self._stream.wait_stream(torch.accelerator.current_stream(self._device))
        with self._stream:
            host_copy.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)  # its memory must not be reused before it has been read
        return host_copy

    def fetch(self, sent: Any) -> Any:
        """Start a copy back to the device, and return it with an event for its end."""
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
    """Hooks of saved tensors that offload them.

    Args:
        copies: the object that copies between the device and the host.
    """

    def __init__(self, copies: StreamCopies) -> None:
        self._copies = copies
        self._last: weakref.ref[_Sent] | None = None

    def pack(self, own: Collection[int], tensor: Tensor) -> Any:
        """Offload a tensor; tensors of the model, whose storages are ``own``, small ones and those on the CPU stay."""
        storage = tensor.untyped_storage()
        if storage.nbytes() < LEAST or storage_key(tensor) in own or tensor.device.type == "cpu":
            return tensor
        before = None if self._last is None else self._last()
        sent = _Sent(self._copies.away(tensor), before)
        self._last = weakref.ref(sent)
        return sent

    def unpack(self, packed: Any) -> Tensor:
        """Return the tensor, and start to fetch those that will be requested next."""
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
    """Return the hooks that offload the tensors of an accelerator."""
    return Offload(StreamCopies(device))
