"""Blocks: modules in the Store's tree that run a repeated layer's part of every Program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from graftc.compat.hooks import forward_hooks
from graftc.passes.core.ir.codegen import Function
from graftc.passes.core.weights.containers import Container, Node, of_fsdp
from graftc.runtime.activations.budget import Choices
from graftc.runtime.hooks.layer_calls import (
    Hearing,
    LayerCall,
    enter,
    given,
    inputs_of,
    is_heard,
    pending_for,
    running_call,
)
from graftc.runtime.hooks.layer_learning import Border


@dataclass(frozen=True)
class Recompute:
    """Settings for how a Block recomputes its activations in the backward pass.

    Attributes:
        options: keyword arguments of `torch.utils.checkpoint.checkpoint`, besides ``use_reentrant``, which is False.
        offload: whether to store the tensors needed for recomputation in host memory.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    offload: bool = False

    def __call__(self, function: Function, *inputs: Any) -> Any:
        """Run a function, storing only its inputs for the backward pass."""
        with self._kept_elsewhere(inputs):
            return checkpoint(function, *inputs, use_reentrant=False, **self.options)

    def _kept_elsewhere(self, inputs: tuple[Any, ...]) -> Any:
        devices = {tensor.device.type for tensor in inputs if isinstance(tensor, Tensor)} - {"cpu"}
        if not self.offload or not devices:
            return nullcontext()
        return save_on_cpu(pin_memory=True, device_type=devices.pop())


class LayerCode(Node):
    """The code that a Block runs, with its settings.

    Attributes:
        functions: the code for the Block's part of each Program, by key.
        choices: how much of its activations each kind of call recomputes.
        checkpointing: whether to recompute activations in the backward pass instead of storing them.
        recompute: how to recompute them.
        borders: the inputs and outputs of the Block's part of each Program, by key.
        calls: how the source's layer is called in each Program, by key; learned once hooks need it.
        hearing: the hooks that observe calls to the model's layers.
    """

    def __init__(self) -> None:
        self.functions: dict[str, Function] = {}
        self.borders: dict[str, Border] = {}
        self.calls: dict[str, LayerCall] = {}
        self.hearing = Hearing()
        self.choices: Choices = {}
        self.checkpointing = False
        self.recompute = Recompute()

    def enter(self, module: nn.Module, *inputs: Any) -> Any:
        """Call the module; a layer with hooks is called with the arguments of the source's layer."""
        if self.hearing.live:  # the source's own module calls the hooks
            return module.forward(*inputs) if forward_hooks(module) else module(*inputs)
        if self.hearing.hooked or self.hearing.everywhere:
            key, *given = inputs
            if is_heard(module) and running_call() is not None:
                return enter(self, module, key, given)
        return module(*inputs)


def _heard(register: Callable[..., RemovableHandle]) -> Any:
    """Return a version of an `nn.Module` hook-registration method for use on layers.

    The hook receives the same values as in the source model, and may change them in the same way, even in calls with a
    cache; gradients are those of the source's arguments and results. If the
    graph does not have a value in the source's form, the hook's access to it raises GC043.
    """

    @wraps(register)
    def registered(self: Block, hook: Any, *args: Any, **options: Any) -> RemovableHandle:
        if not of_fsdp(hook):
            self._graftc.hearing.hooked = True
        return register(self, hook, *args, **options)

    return registered


class Block(Container):
    """A module for a repeated layer, which owns the layer's tensors and runs its part of every Program."""

    _graftc: LayerCode

    def __init__(self) -> None:
        super().__init__()
        self._graftc = LayerCode()

    register_forward_hook = _heard(nn.Module.register_forward_hook)
    register_forward_pre_hook = _heard(nn.Module.register_forward_pre_hook)
    register_full_backward_hook = _heard(nn.Module.register_full_backward_hook)
    register_full_backward_pre_hook = _heard(nn.Module.register_full_backward_pre_hook)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Run a part of a Program, given its key and inputs, or a call that `LayerCode.enter` has prepared.

        Raises:
            GraftError: GC043 if user code calls the layer directly, as it would call the source's layer.
        """
        code = self._graftc
        key, *values = inputs or (None,)
        if isinstance(key, str) and not options:
            return self._run(key, values)
        if (pending := pending_for(code)) is None:
            return super().forward()
        return given(pending, self._run(pending.key, inputs_of(pending, inputs, options)))

    def _run(self, key: str, inputs: Sequence[Any]) -> Any:
        code = self._graftc
        function = code.functions[key]
        if code.checkpointing and self.training and torch.is_grad_enabled():
            return code.recompute(getattr(function, "function", function), self, *inputs)
        return function(self, *inputs)
