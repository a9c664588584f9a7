"""Training Programs are lowered before they become code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from graftc.compiler.pipeline import signature_for
from graftc.passes.core.ir.codegen import Function
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.program_key import ProgramKey
from graftc.passes.lowering.asked import warn_of_whole
from graftc.passes.lowering.lower import lower
from graftc.runtime.activations.summary import Activations
from graftc.runtime.activations.training_code import training_code
from graftc.runtime.model.runner import ModelRunner

if TYPE_CHECKING:
    from graftc.compiler.inspect.lowering import Lowered


class Lowering(ModelRunner):
    """The part of `Compiled` that rewrites training graphs before they become code."""

    def lowered(self, key: ProgramKey) -> Program:
        """See `Runner.lowered`."""
        program = self._programs[key]
        if not _trains(key):
            return program
        spec = self._active.spec
        lowered, self._outcomes[key] = lower(program, spec, self._steering.outputs)
        if key not in self._lowered:  # the first time
            warn_of_whole(spec, program, self._outcomes[key])
        return lowered

    def code(self, key: ProgramKey, graph: fx.Graph, module: nn.Module, device: torch.device) -> Function:
        """See `Runner.code`. Training graphs keep less for the backward pass than autograd would."""
        if not _trains(key):
            return super().code(key, graph, module, device)
        memory, off = self._active.spec.memory, self._active.spec.optimise.off
        plain = "recompute" in off and memory.budget is None and not memory.offload
        return training_code(graph, module, device, plain=plain, budget=memory.budget, offload=memory.offload)

    def activations(self, **inputs: Any) -> Activations:
        """What a training step keeps for its backward pass and takes at its peak, worked out on tensors without memory.

        Args:
            inputs: of a call; of tensors the sizes count alone. Where the outputs have a ``loss``, the step is that of
                the loss, otherwise that of all outputs.

        Raises:
            GraftError: GC031 for inputs that cannot be captured.
        """
        from graftc.runtime.model.simulated_step import simulated_step

        present, _ = self._interface.read(self._interface.named((), inputs))
        return simulated_step(self, signature_for(self._active, present), present)

    def lowering(self) -> Lowered:
        """Which sites the steps of lowering rewrite in the training graph of the first signature, and why not the
        others; print it to read it."""
        from graftc.compiler.inspect.lowering import lowering
        from graftc.compiler.inspect.snapshot import snapshot

        return lowering(snapshot(self._compilation))


def _trains(key: ProgramKey) -> bool:
    return key.mode != "eval" and key.stage == "adapted"
