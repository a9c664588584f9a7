"""Blocks: modules of the Store's tree that run a repeated layer's part of every Program."""

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
    """Settings by which a Block recomputes its activations in the backward pass.

    Attributes:
        options: keyword arguments of `torch.utils.checkpoint.checkpoint`, besides ``use_reentrant``, which is False.
        offload: whether to keep what is needed for recomputing in the host's memory.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    offload: bool = False

    def __call__(self, function: Function, *inputs: Any) -> Any:
        """Run a function and keep only its inputs."""
        with self._kept_elsewhere(inputs):
            return checkpoint(function, *inputs, use_reentrant=False, **self.options)

    def _kept_elsewhere(self, inputs: tuple[Any, ...]) -> Any:
        devices = {tensor.device.type for tensor in inputs if isinstance(tensor, Tensor)} - {"cpu"}
        if not self.offload or not devices:
            return nullcontext()
        return save_on_cpu(pin_memory=True, device_type=devices.pop())


class LayerCode(Node):
    """The code that a Block runs, and how it runs it.

    Attributes:
        functions: the code of its part of each Program, by key.
        choices: the amount of its activations that each kind of call computes again.
        checkpointing: whether to recompute activations in the backward pass instead of keeping them.
        recompute: how to recompute them.
        borders: the inputs and outputs of its part of each Program, by key.
        calls: how the source's layer is called there, by key, once hooks have requested it.
        hearing: whether any layer of the model has hooks.
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
        """Call the module; a layer with hooks is called as the source's layer is."""
        if self.hearing.live:  # the source's own module calls the hooks
            return module.forward(*inputs) if forward_hooks(module) else module(*inputs)
        if self.hearing.hooked or self.hearing.everywhere:
            key, *given = inputs
            if is_heard(module) and running_call() is not None:
                return enter(self, module, key, given)
        return module(*inputs)


def _heard(register: Callable[..., RemovableHandle]) -> Any:
    """Return a method of `nn.Module` that registers a hook, for layers.

    The hook gets, and may change, what it does in the source model, also in calls with a cache; gradients are those of
    the source's arguments and results. A value that the graph does not have in the source's form raises GC043 when the
    hook looks into it.
    """

    @wraps(register)
    def registered(self: Block, hook: Any, *args: Any, **options: Any) -> RemovableHandle:
        if not of_fsdp(hook):
            self._graftc.hearing.hooked = True
        return register(self, hook, *args, **options)

    return registered


class Block(Container):
    """A repeated layer, which owns its tensors and runs its part of every Program."""

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
            GraftError: GC043 for a call like the source layer's that no graph makes.
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
