"""Training Programs are lowered before they become code."""

from __future__ import annotations

import torch
from torch import fx, nn

from graftc.passes.core.ir.codegen import Function
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.program_key import ProgramKey
from graftc.passes.lowering.lower import lower
from graftc.runtime.activations.training_code import training_code
from graftc.runtime.model.runner import ModelRunner


class Lowering(ModelRunner):
    """The part of `Compiled` that rewrites training graphs before they become code."""

    def lowered(self, key: ProgramKey) -> Program:
        """See `Runner.lowered`."""
        program = self._programs[key]
        if not _trains(key):
            return program
        lowered, self._outcomes[key] = lower(program, self._active.spec.optimise.off)
        return lowered

    def code(self, key: ProgramKey, graph: fx.Graph, module: nn.Module, device: torch.device) -> Function:
        """See `Runner.code`. Training graphs keep less for the backward pass than autograd would."""
        spec = self._active.spec
        if not _trains(key) or ("recompute" in spec.optimise.off and spec.memory.budget is None):
            return super().code(key, graph, module, device)
        return training_code(graph, module, device, spec.memory.budget)


def _trains(key: ProgramKey) -> bool:
    return key.mode != "eval" and key.stage == "adapted"
