"""Training Programs are lowered before they become code."""

from __future__ import annotations

from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.program_key import ProgramKey
from graftc.passes.lowering.lower import lower
from graftc.runtime.model.runner import ModelRunner


class Lowering(ModelRunner):
    """The part of `Compiled` that rewrites training graphs before they become code."""

    def lowered(self, key: ProgramKey) -> Program:
        """See `Runner.lowered`."""
        program = self._programs[key]
        if key.mode == "eval" or key.stage != "adapted":
            return program
        lowered, self._outcomes[key] = lower(program, self._active.spec.optimise.off)
        return lowered
