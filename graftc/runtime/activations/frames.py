"""Graph calls that keep less memory than autograd would: values that are not kept are recomputed when first read.

A frame receives every tensor that autograd saves while the code runs. When the code no longer needs a value that will
be recomputed, the frame releases the tensors saved from that value's storage. Autograd itself computes the gradients,
from the same values that it would otherwise have kept.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from graftc.compat.tensors import storage_key, version_of
from graftc.passes.core.ir.codegen import tensor_at

Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]
"""The pack and unpack functions passed to `torch.autograd.graph.saved_tensors_hooks`."""

Casts = tuple[tuple[str, torch.dtype, bool, bool], ...]
"""A call's autocast settings: device type, dtype, whether autocast is on, and whether casts are cached."""

_CHANGED = (
    "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor that "
    "activations are recomputed from has changed since the forward pass"
)


@dataclass(frozen=True)
class PartCode:
    """The code that recomputes values.

    Attributes:
        function: ``f(*roots, *parameters)``, which returns a tuple of values.
        roots: the indices of the frame's kept values that it reads.
        parameters: the names of the parameters that it reads, which must have the values of the forward pass.
    """

    function: Callable[..., tuple[Tensor, ...]]
    roots: tuple[int, ...]
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class FrameCode:
    """The code of a graph with marks.

    Attributes:
        function: ``f(module, frame, *inputs)``, which calls `Frame.keep` and `Frame.mark` on the frame.
        parts: the code that recomputes values.
        targets: for each marked value, the indices of its part and of the value within that part.
    """

    function: Callable[..., Any]
    parts: tuple[PartCode, ...]
    targets: tuple[tuple[int, int], ...]


class _Part:
    """Values of one call that are recomputed together.

    Attributes:
        roots: the values from which they are computed; None before the end of the forward pass and after recomputation.
        parameters: the parameters that are read, with their versions.
    """

    def __init__(self, code: PartCode, frame: Frame) -> None:
        self.code, self.module, self.casts = code, frame.module, frame.casts
        self.roots: list[Any] | None = None
        # Keep the tensors themselves, because they may have been replaced by the time of the backward pass.
        self.parameters = [(p.detach(), version_of(p)) for p in (tensor_at(self.module, n) for n in code.parameters)]
        self.slots: dict[int, weakref.ref[_Slot]] = {}

    def compute(self) -> None:
        """Recompute the values and store them in the slots that still exist."""
        assert self.roots is not None
        if any(version_of(parameter) != version for parameter, version in self.parameters):
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
    """A recomputed value, shared by all tensors that autograd saved from its storage."""

    __slots__ = ("__weakref__", "part", "size", "stride", "value")

    def __init__(self, part: _Part, value: Tensor) -> None:
        self.part: _Part | None = part
        self.size, self.stride = value.shape, value.stride()
        self.value: Tensor | None = None

    def fill(self, value: Tensor) -> None:
        """Store the value with its original memory layout."""
        if value.stride() != self.stride or not _is_whole(value):
            laid = torch.empty_strided(self.size, self.stride, dtype=value.dtype, device=value.device)
            value = laid.copy_(value)
        self.value, self.part = value, None

    def get(self) -> Tensor:
        """Return the value, computing it if necessary."""
        if self.value is None:
            assert self.part is not None
            self.part.compute()
        assert self.value is not None
        return self.value


class _Kept:
    """A tensor that is kept, either directly or by the caller's own hooks."""

    __slots__ = ("hooks", "tensor", "version")

    def __init__(self, tensor: Tensor, version: int, hooks: Hooks | None) -> None:
        self.hooks, self.version = hooks, version
        self.tensor: Any = tensor if hooks is None else hooks[0](tensor)

    def get(self) -> Tensor:
        """Return the tensor; raise an error if it has been modified since it was kept."""
        if self.hooks is not None:
            return self.hooks[1](self.tensor)
        tensor: Tensor = self.tensor
        if version_of(tensor) != self.version:
            raise RuntimeError(_CHANGED)
        return tensor


class _Saved:
    """The object that autograd keeps instead of a tensor: it holds the tensor itself or the means to restore it.

    Attributes:
        source: the tensor, a slot, or a value kept by the caller's own hooks.
        version: the version of the tensor when it was saved.
        view: the size, strides and offset of the tensor within a slot's value.
    """

    __slots__ = ("source", "version", "view")

    def __init__(self, tensor: Tensor) -> None:
        # A result that its own operator saves would keep the operator alive.
        self.source: Any = tensor if tensor.grad_fn is None else tensor.detach()
        self.version = version_of(tensor)

    def become(self, slot: _Slot) -> None:
        """Release the tensor; a slot will provide its value."""
        self.view = self.source.shape, self.source.stride(), self.source.storage_offset()
        self.source = slot

    def get(self) -> Tensor:
        """Return the tensor."""
        source = self.source
        if isinstance(source, Tensor):
            if version_of(source) != self.version:
                raise RuntimeError(_CHANGED)
            return source
        if isinstance(source, _Slot):
            return source.get().as_strided(*self.view)
        return cast(Tensor, source.get())


def _is_whole(tensor: Tensor) -> bool:
    """Return whether a tensor covers its entire storage."""
    return tensor.storage_offset() == 0 and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


class Frame:
    """One call to a graph that keeps less memory than autograd would.

    Args:
        code: the code to run.
        module: the module to run it on.
        hooks: the caller's own hooks, which store the values that are kept; None if there are no such hooks.
        casts: the caller's autocast settings.
    """

    def __init__(self, code: FrameCode, module: nn.Module, hooks: Hooks | None, casts: Casts) -> None:
        self.code, self.module, self.hooks, self.casts = code, module, hooks, casts
        self.open: dict[int, list[_Saved]] = {}
        self.kept: dict[int, Any] = {}
        self.parts: dict[int, _Part] = {}

    def run(self, inputs: Sequence[Any]) -> Any:
        """Return the outputs of the call."""
        with torch.autograd.graph.saved_tensors_hooks(self.pack, _Saved.get):
            outputs = self.code.function(self.module, self, *inputs)
        if self.hooks is not None:
            for waiting in self.open.values():
                for saved in waiting:
                    saved.source = _Kept(saved.source, saved.version, self.hooks)
        for part in self.parts.values():
            part.roots = [self.kept[index] for index in part.code.roots]
        return outputs

    def pack(self, tensor: Tensor) -> _Saved:
        """Record a tensor that autograd saves, and return the object that autograd keeps instead."""
        saved = _Saved(tensor)
        self.open.setdefault(storage_key(tensor), []).append(saved)
        return saved

    def keep(self, index: int, value: Any) -> None:
        """Keep a value from which others are recomputed."""
        if isinstance(value, Tensor):
            value = _Kept(value.detach(), version_of(value), self.hooks)
        self.kept[index] = value

    def mark(self, index: int, value: Tensor) -> None:
        """Release the tensors saved from a value that will be recomputed and that the code no longer reads."""
        waiting = self.open.pop(storage_key(value), None)
        if waiting is None:
            return
        version = version_of(value)
        if not _is_whole(value) or any(s.source.dtype != value.dtype or s.version != version for s in waiting):
            self.open[storage_key(value)] = waiting
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
    """Return the current autocast settings for the given device types."""
    cached = torch.is_autocast_cache_enabled()
    return tuple((d, torch.get_autocast_dtype(d), torch.is_autocast_enabled(d), cached) for d in devices)
