"""A training step of a compiled model on tensors without memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from graftc.passes.core.ir.program_key import Signature
from graftc.runtime.activations.recording import fake
from graftc.runtime.activations.simulated import peak_of
from graftc.runtime.activations.summary import Activations, layers_of
from graftc.runtime.activations.training_code import choices_of
from graftc.runtime.model.blocks import Block, Root
from graftc.runtime.model.runner import ModelRunner, runner_of


def simulated_step(runner: ModelRunner, signature: Signature, present: Mapping[str, Any]) -> Activations:
    """What a forward and a backward pass keep and take.

    Args:
        runner: of the model, which stays as it is.
        signature: of the call.
        present: tensors and flags of the call, by name; of tensors the sizes count alone.
    """
    mode = FakeTensorMode()
    tensors = [*runner.module.parameters(), *runner.module.buffers()]
    module = copy.deepcopy(runner.module, {id(tensor): _faked(tensor, mode) for tensor in tensors}).train()
    own: ModelRunner = runner_of(module)
    parts = [(name, part) for name, part in module.named_modules() if isinstance(part, (Block, Root))]
    for _, part in parts:
        choices_of(part).clear()  # they are of other sizes
    key = own.key(signature, "train")
    if key not in own._roots:
        own.install(key, own._program_of(key))
    given = fake(dict(present), mode)
    code: Any = own._roots[key]
    if code.plain:  # which chooses nothing by itself
        inputs = own.inputs(key, given)
        code.choose(own.module, inputs, code.kind(own.module, inputs))

    def loss() -> Tensor:
        # Nothing else of the results is there in the backward pass, as where a training loop takes the loss alone.
        named = zip(own._lowered[key].outputs.names, own.run(key, given), strict=True)
        floats = {name: value for name, value in named if isinstance(value, Tensor) and value.requires_grad}
        return floats["loss"] if "loss" in floats else torch.stack([value.sum() for value in floats.values()]).sum()

    with mode, torch.enable_grad():
        peak = peak_of(lambda: torch.autograd.backward(loss()))
    return Activations(tuple(layers_of(parts)), peak)


def _faked(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    found: Tensor = fake(tensor.detach(), mode)
    with mode:
        return nn.Parameter(found, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else found
