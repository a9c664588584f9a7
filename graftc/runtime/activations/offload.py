"""Holding what is kept in the host's memory, while the device goes on.

Copies have a stream of their own. On the way back, whatever was sent away just before what is asked for is fetched too,
since the backward pass reads things in the opposite order.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import Any, Protocol

import torch
from torch import Tensor

LEAST = 2**20
"""Bytes of the smallest tensor that is sent away: smaller ones take longer than they are worth."""

AHEAD = 2
"""How many tensors are fetched before they are asked for."""


class Copies(Protocol):
    """What copies between a device and the host."""

    def away(self, tensor: Tensor) -> Any:
        """Begin to copy to the host."""

    def fetch(self, sent: Any) -> Any:
        """Begin to copy back."""

    def arrived(self, fetched: Any) -> Tensor:
        """The tensor, on the device, for what runs there from now on."""


class StreamCopies:
    """Copies of an accelerator, on a stream of their own.

    Args:
        device: the accelerator.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.Stream(device)

    def away(self, tensor: Tensor) -> Any:
        """See `Copies`."""
        held = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, pin_memory=True)
        self._stream.wait_stream(torch.accelerator.current_stream(self._device))
        with self._stream:
            held.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)  # its memory is not given out again before it has been read
        return held

    def fetch(self, sent: Any) -> Any:
        """See `Copies`."""
        with self._stream:
            fetched = sent.to(self._device, non_blocking=True)
        return fetched, self._stream.record_event()

    def arrived(self, fetched: Any) -> Tensor:
        """See `Copies`."""
        tensor: Tensor
        tensor, event = fetched
        here = torch.accelerator.current_stream(self._device)
        here.wait_event(event)
        tensor.record_stream(here)
        return tensor


class _Sent:
    """A tensor that is away."""

    __slots__ = ("__weakref__", "before", "fetched", "sent")

    def __init__(self, sent: Any, before: _Sent | None) -> None:
        self.sent: Any = sent
        self.fetched: Any = None
        self.before = None if before is None else weakref.ref(before)


class Offload:
    """Hooks of saved tensors.

    Args:
        copies: what copies.
    """

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        self._last: weakref.ref[_Sent] | None = None

    def pack(self, own: Collection[int], tensor: Tensor) -> Any:
        """Send a tensor away. Tensors of the model, whose storages are ``own``, and small ones stay."""
        storage = tensor.untyped_storage()
        if storage.nbytes() < LEAST or storage._cdata in own or tensor.device.type == "cpu":
            return tensor
        before = None if self._last is None else self._last()
        sent = _Sent(self._copies.away(tensor), before)
        self._last = weakref.ref(sent)
        return sent

    def unpack(self, held: Any) -> Tensor:
        """The tensor; those that will be asked for next are on their way."""
        if isinstance(held, Tensor):
            return held
        one: _Sent | None = held
        for _ in range(1 + AHEAD):
            if one is None:
                break
            if one.fetched is None:
                one.fetched = self._copies.fetch(one.sent)
            one = None if one.before is None else one.before()
        return self._copies.arrived(held.fetched)


_OFFLOADS: dict[torch.device, Offload] = {}


def offload_of(device: torch.device) -> Offload:
    """That of an accelerator."""
    if device not in _OFFLOADS:
        _OFFLOADS[device] = Offload(StreamCopies(device))
    return _OFFLOADS[device]
