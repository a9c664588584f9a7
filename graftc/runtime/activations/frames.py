"""One call of a graph that keeps less than autograd would: what is not kept is computed again when it is first read.

A frame hears of every tensor that autograd saves while the code runs. Where the code is done with a value that is to be
computed again, what was saved of its storage is let go. The gradients are autograd's own, of the values that it would
have kept.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]
"""Pack and unpack, as `torch.autograd.graph.saved_tensors_hooks` takes them."""

Casts = tuple[tuple[str, torch.dtype, bool, bool], ...]
"""Autocast of a call: device, element type, whether it is on, and whether casts are cached."""

_CHANGED = (
    "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor that "
    "activations are computed again from has changed since the forward pass"
)


@dataclass(frozen=True)
class PartCode:
    """What computes values again.

    Attributes:
        function: ``f(*roots, *parameters)``, a tuple of values.
        roots: which of the frame's kept values it reads.
        parameters: names of those that it reads, as they are in the forward pass.
    """

    function: Callable[..., tuple[Tensor, ...]]
    roots: tuple[int, ...]
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class FrameCode:
    """A graph's code with marks.

    Attributes:
        function: ``f(module, frame, *inputs)``, which calls `keep` and `mark` on the frame.
        parts: what computes values again.
        targets: for each marked value, its part and its place among the part's values.
        tensor_at: gives a parameter of a module by name.
    """

    function: Callable[..., Any]
    parts: tuple[PartCode, ...]
    targets: tuple[tuple[int, int], ...]
    tensor_at: Callable[[nn.Module, str], Tensor]


class _Part:
    """Values of one call that are computed again together.

    Attributes:
        roots: what they are computed from; None before the forward pass is over, and once they are there.
        parameters: those that are read, with their versions.
    """

    def __init__(self, code: PartCode, frame: Frame) -> None:
        self.code, self.module, self.casts = code, frame.module, frame.casts
        tensor_at = frame.code.tensor_at
        self.roots: list[Any] | None = None
        # The tensors themselves: others may have their places when the backward pass comes.
        self.parameters = [(p.detach(), p._version) for p in (tensor_at(self.module, n) for n in code.parameters)]
        self.slots: dict[int, weakref.ref[_Slot]] = {}

    def compute(self) -> None:
        """Fill the slots that are still wanted."""
        assert self.roots is not None
        if any(parameter._version != version for parameter, version in self.parameters):
            raise RuntimeError(_CHANGED)
        roots = [root.get() if isinstance(root, _Kept) else root for root in self.roots]
        with ExitStack() as stack:
            if torch.is_grad_enabled():
                stack.enter_context(torch.no_grad())
            for device, dtype, on, cached in self.casts:
                if on or torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, dtype, on, cached))
            values = self.code.function(*roots, *(parameter for parameter, _ in self.parameters))
        for place, reference in self.slots.items():
            slot = reference()
            if slot is not None:
                slot.fill(values[place])
        self.roots = None


class _Slot:
    """A value that is computed again, for all that autograd saved of it."""

    __slots__ = ("__weakref__", "part", "size", "stride", "value")

    def __init__(self, part: _Part, value: Tensor) -> None:
        self.part: _Part | None = part
        self.size, self.stride = value.shape, value.stride()
        self.value: Tensor | None = None

    def fill(self, value: Tensor) -> None:
        """Take the value, laid out in memory as it was."""
        if value.stride() != self.stride or not _is_whole(value):
            laid = torch.empty_strided(self.size, self.stride, dtype=value.dtype, device=value.device)
            value = laid.copy_(value)
        self.value, self.part = value, None

    def get(self) -> Tensor:
        """The value."""
        if self.value is None:
            assert self.part is not None
            self.part.compute()
        assert self.value is not None
        return self.value


class _Kept:
    """A tensor that is kept."""

    __slots__ = ("hooks", "tensor", "version")

    def __init__(self, tensor: Tensor, version: int, hooks: Hooks | None) -> None:
        self.hooks, self.version = hooks, version
        self.tensor: Any = tensor if hooks is None else hooks[0](tensor)

    def get(self) -> Tensor:
        """The tensor, as it was."""
        if self.hooks is not None:
            return self.hooks[1](self.tensor)
        tensor: Tensor = self.tensor
        if tensor._version != self.version:
            raise RuntimeError(_CHANGED)
        return tensor


class _Saved:
    """What autograd holds in the place of a tensor: first the tensor, then what it is had again from.

    Attributes:
        held: a tensor, a slot, or what the caller's own hooks keep.
        version: of the tensor when it was saved.
        view: size, strides and offset of the tensor in a slot's value.
    """

    __slots__ = ("held", "version", "view")

    def __init__(self, tensor: Tensor) -> None:
        # An operator's own result, held by the operator, would hold the operator.
        self.held: Any = tensor if tensor.grad_fn is None else tensor.detach()
        self.version = tensor._version

    def become(self, slot: _Slot) -> None:
        """Let the tensor go: a slot has its value."""
        tensor = self.held
        self.view = tensor.shape, tensor.stride(), tensor.storage_offset()
        self.held = slot

    def get(self) -> Tensor:
        """The tensor."""
        held = self.held
        if isinstance(held, Tensor):
            if held._version != self.version:
                raise RuntimeError(_CHANGED)
            return held
        if isinstance(held, _Slot):
            return held.get().as_strided(*self.view)
        found: Tensor = held.get()
        return found


def _unpack(saved: _Saved) -> Tensor:
    return saved.get()


def _is_whole(tensor: Tensor) -> bool:
    """Whether a tensor is all that there is in its storage."""
    return tensor.storage_offset() == 0 and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


class Frame:
    """One call.

    Args:
        code: what it runs.
        module: what it runs on.
        hooks: the caller's own, which keep what is kept.
        casts: the caller's autocast.
    """

    def __init__(self, code: FrameCode, module: nn.Module, hooks: Hooks | None, casts: Casts) -> None:
        self.code, self.module, self.hooks, self.casts = code, module, hooks, casts
        self.open: dict[int, list[_Saved]] = {}
        self.kept: dict[int, Any] = {}
        self.parts: dict[int, _Part] = {}

    def run(self, inputs: Sequence[Any]) -> Any:
        """The outputs of the call."""
        with torch.autograd.graph.saved_tensors_hooks(self.pack, _unpack):
            outputs = self.code.function(self.module, self, *inputs)
        if self.hooks is not None:
            for waiting in self.open.values():
                for saved in waiting:
                    saved.held = _Kept(saved.held, saved.version, self.hooks)
        for part in self.parts.values():
            part.roots = [self.kept[index] for index in part.code.roots]
        return outputs

    def pack(self, tensor: Tensor) -> _Saved:
        """Take what autograd saves."""
        saved = _Saved(tensor)
        self.open.setdefault(tensor.untyped_storage()._cdata, []).append(saved)
        return saved

    def keep(self, index: int, value: Any) -> None:
        """A value that others are computed again from is there."""
        if isinstance(value, Tensor):
            value = _Kept(value.detach(), value._version, self.hooks)
        self.kept[index] = value

    def mark(self, index: int, value: Tensor) -> None:
        """A value that is to be computed again is no longer read by the code."""
        waiting = self.open.pop(value.untyped_storage()._cdata, None)
        if waiting is None:
            return
        if not _is_whole(value) or any(s.held.dtype != value.dtype or s.version != value._version for s in waiting):
            self.open[value.untyped_storage()._cdata] = waiting
            return
        number, place = self.code.targets[index]
        part = self.parts.get(number)
        if part is None:
            part = self.parts[number] = _Part(self.code.parts[number], self)
        slot = _Slot(part, value)
        part.slots[place] = weakref.ref(slot)
        for saved in waiting:
            saved.become(slot)


def casts_of(devices: Sequence[str]) -> Casts:
    """The autocast that is in force here."""
    cached = torch.is_autocast_cache_enabled()
    return tuple((d, torch.get_autocast_dtype(d), torch.is_autocast_enabled(d), cached) for d in devices)
