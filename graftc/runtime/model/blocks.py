"""Blocks: modules of the Store's tree that run a repeated layer's part of every Program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
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
    is_running,
    pending_for,
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
            if is_heard(module) and is_running():
                return enter(self, module, key, given)
        return module(*inputs)


class Block(Container):
    """A repeated layer, which owns its tensors and runs its part of every Program."""

    _graftc: LayerCode

    def __init__(self) -> None:
        super().__init__()
        self._graftc = LayerCode()

    def register_forward_hook(self, hook: Any, **options: Any) -> RemovableHandle:
        """Register a hook that gets, and may change, what it does in the source model, also in calls with a cache.

        A value that the graph does not have in the source's form raises GC043 when the hook looks into it.
        """
        self._hear(hook)
        return nn.Module.register_forward_hook(self, hook, **options)

    def register_forward_pre_hook(self, hook: Any, **options: Any) -> RemovableHandle:
        """Register a forward pre-hook, as `register_forward_hook` does."""
        self._hear(hook)
        return nn.Module.register_forward_pre_hook(self, hook, **options)

    def register_full_backward_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        """Register a backward hook, as `register_forward_hook` does.

        Its gradients are those of the source's arguments and results.
        """
        self._hear(hook)
        return nn.Module.register_full_backward_hook(self, hook, prepend)

    def register_full_backward_pre_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        """Register a backward pre-hook, as `register_full_backward_hook` does."""
        self._hear(hook)
        return nn.Module.register_full_backward_pre_hook(self, hook, prepend)

    def _hear(self, hook: Any) -> None:
        if not of_fsdp(hook):
            self._graftc.hearing.hooked = True

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
