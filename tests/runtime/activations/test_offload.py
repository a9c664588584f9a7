"""Kept tensors move to the host's memory, and come back before they are needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from graftc.runtime.activations import offload as module
from graftc.runtime.activations.offload import AHEAD, Offload


class Noted:
    """Copies that record what is done, on tensors of the meta device, which represents an accelerator."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, int]] = []

    def away(self, tensor: Tensor) -> Any:
        self.notes.append(("away", tensor.shape[0]))
        return tensor

    def fetch(self, sent: Any) -> Any:
        self.notes.append(("fetch", sent.shape[0]))
        return sent

    def arrived(self, fetched: Any) -> Tensor:
        self.notes.append(("arrived", fetched.shape[0]))
        tensor: Tensor = fetched
        return tensor


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Noted:
    monkeypatch.setattr(module, "LEAST", 8)
    return Noted()


def test_tensors_are_fetched_before_they_are_asked_for(copies: Noted) -> None:
    offload = Offload(copies)
    packed = [offload.pack((), torch.empty(size, 4, device="meta")) for size in range(1, 7)]
    assert copies.notes == [("away", size) for size in range(1, 7)]
    copies.notes.clear()
    for one in reversed(packed):
        offload.unpack(one)
    order = [size for what, size in copies.notes if what == "arrived"]
    assert order == [6, 5, 4, 3, 2, 1]
    fetched = [size for what, size in copies.notes if what == "fetch"]
    assert fetched == [6, 5, 4, 3, 2, 1]
    for size in range(1, 7 - AHEAD):
        ahead = copies.notes.index(("fetch", size))
        assert ahead < copies.notes.index(("arrived", size + AHEAD))


def test_what_nobody_wants_any_more_is_not_fetched(copies: Noted) -> None:
    offload = Offload(copies)
    packed = [offload.pack((), torch.empty(size, 4, device="meta")) for size in range(1, 4)]
    del packed[1]
    offload.unpack(packed[-1])
    assert ("fetch", 2) not in copies.notes


def test_the_models_tensors_small_ones_and_those_of_the_host_stay(copies: Noted) -> None:
    offload = Offload(copies)
    own, small = torch.empty(64, device="meta"), torch.empty(1, device="meta")
    on_host = torch.empty(64)
    assert offload.pack({own.untyped_storage()._cdata}, own.t()).device.type == "meta"
    assert offload.pack((), small) is small and offload.unpack(small) is small
    assert offload.pack((), on_host) is on_host
    assert not copies.notes
