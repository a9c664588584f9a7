"""The Runner of a compiled model: it finds what is offered, and lets that take part in calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from graftc.compiler.compilation import Compilation
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.program_key import ProgramKey
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.model.generation import loop_attribute
from graftc.runtime.model.libraries import ELSEWHERE, NotHereError, taken_over
from graftc.runtime.model.root import Root
from graftc.runtime.offered import OFFERED
from graftc.runtime.offered.state import keep_state
from graftc.runtime.training.repeated import outputs_of
from graftc.runtime.training.steering import TrainingSteering, watch_training


class CompiledRunner(AdaptedRunner):
    """All that a `Compiled` does.

    Args:
        compilation: what it runs.
        make: makes the compiled model of another Compilation.
    """

    _keys_to_ignore_on_save = None

    def __init__(self, compilation: Compilation, make: Callable[[Compilation], Any]) -> None:
        super().__init__(compilation, compilation.store)
        self._make = make
        vars(self).update(taken_over(compilation.model))

    def __getattr__(self, name: str) -> Any:
        """What is offered, and what does the same where other libraries' models have an attribute of this name."""
        if name in OFFERED:
            return getattr(OFFERED[name](self), name)
        if name in ELSEWHERE:
            kind = type(self.compilation.model).__name__
            raise NotHereError("GC072", f"a compiled {kind} has no {name}", hint=ELSEWHERE[name])
        return loop_attribute(self, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *OFFERED})

    def made(self, compilation: Compilation) -> Any:
        """See `AdaptedRunner`."""
        return self._make(compilation)

    def adopt(self, module: Root) -> None:
        """See `Runner.adopt`."""
        super().adopt(module)
        keep_state(module)

    def install(self, key: ProgramKey, program: Program) -> None:
        """See `Runner.install`."""
        super().install(key, program)
        outputs_of(self.shown.executables[key])

    def entering(self, mode: bool) -> bool:
        """In eval mode nothing of a training is prepared for."""
        if not mode:
            TrainingSteering(self).pause()
        return mode

    def results(self, key: ProgramKey, present: Mapping[str, Any]) -> tuple[Any, ...]:
        """See `ModelRunner`. Controllers and objectives take part in a training."""
        return TrainingSteering(self).results(key, present)

    def copied(self) -> None:
        """See `ModelRunner`. What steers a training, and how far it is, is copied as well."""
        super().copied()
        watch_training(self)
        TrainingSteering(self).pause()
