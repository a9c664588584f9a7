"""Training Programs are lowered before they become code."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from graftc.compiler.pipeline import signature_for
from graftc.passes.core.ir.codegen import Function
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.program_key import ProgramKey
from graftc.passes.lowering.lower import lower
from graftc.runtime.activations.recording import fake
from graftc.runtime.activations.simulated import peak_of
from graftc.runtime.activations.summary import Activations, layers_of
from graftc.runtime.activations.training_code import levels_of, training_code
from graftc.runtime.model.blocks import Block, Root
from graftc.runtime.model.chunked import loss_step, warn_of_whole
from graftc.runtime.model.runner import ModelRunner, runner_of


class Lowering(ModelRunner):
    """The part of `Compiled` that rewrites training graphs before they become code."""

    _steering: Any

    def lowered(self, key: ProgramKey) -> Program:
        """See `Runner.lowered`."""
        program = self._programs[key]
        if not _trains(key):
            return program
        spec = self._active.spec
        lowered, self._outcomes[key] = lower(program, spec.optimise.off, loss_step(spec, self._steering.outputs))
        warn_of_whole(spec, program, self._outcomes[key])
        return lowered

    def activations(self, **inputs: Any) -> Activations:
        """What a training step keeps for its backward pass and takes at its peak, worked out on tensors without memory.

        Args:
            inputs: of a call; of tensors the sizes count alone. Where the outputs have a ``loss``, the step is that of
                the loss, otherwise that of all outputs.

        Raises:
            GraftError: GC031 for inputs that cannot be captured.
        """
        present, _ = self._interface.read(self._interface.named((), inputs))
        signature = signature_for(self._active, present)
        mode = FakeTensorMode()
        tensors = [*self.module.parameters(), *self.module.buffers()]
        copied = copy.deepcopy(self.module, {id(tensor): _faked(tensor, mode) for tensor in tensors}).train()
        runner: Lowering = runner_of(copied)
        for module in copied.modules():
            if isinstance(module, (Block, Root)):
                levels_of(module).clear()
        key = self.key(signature, "train")
        if key not in runner._roots:
            runner.install(key, runner._program_of(key))
        given = fake(present, mode)

        def loss_of_call() -> Tensor:
            # Nothing else of the results is there in the backward pass, as where a training loop takes the loss alone.
            results = runner.run(key, given)
            names = runner._lowered[key].outputs.names
            floats = {n: t for n, t in zip(names, results, strict=True) if isinstance(t, Tensor) and t.requires_grad}
            return floats["loss"] if "loss" in floats else torch.stack([t.sum() for t in floats.values()]).sum()

        def step() -> None:
            loss_of_call().backward()  # type: ignore[no-untyped-call]

        with mode, torch.enable_grad():
            peak = peak_of(step)
        parts = [(n, m) for n, m in copied.named_modules() if isinstance(m, (Block, Root))]
        return Activations(tuple(layers_of(parts)), peak)

    def code(self, key: ProgramKey, graph: fx.Graph, module: nn.Module, device: torch.device) -> Function:
        """See `Runner.code`. Training graphs keep less for the backward pass than autograd would."""
        spec = self._active.spec
        memory = spec.memory
        plain = "recompute" in spec.optimise.off and memory.budget is None and not memory.offload
        if not _trains(key) or plain:
            return super().code(key, graph, module, device)
        return training_code(graph, module, device, memory.budget, memory.offload)


def _trains(key: ProgramKey) -> bool:
    return key.mode != "eval" and key.stage == "adapted"


def _faked(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    found: Tensor = fake(tensor.detach(), mode)
    with mode:
        return nn.Parameter(found, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else found
