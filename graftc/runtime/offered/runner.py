"""The Runner of a compiled model, which looks up the offered features and lets them take part in calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from graftc.compat.transformers import saves_all_keys
from graftc.compiler.compilation import Compilation
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.program_key import ProgramKey
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.model.generation import loop_attribute
from graftc.runtime.model.libraries import ELSEWHERE, NotHereError, taken_over
from graftc.runtime.model.root import Root
from graftc.runtime.offered import OFFERED
from graftc.runtime.offered.state_dicts import keep_state
from graftc.runtime.training.repeated import outputs_of
from graftc.runtime.training.steering import TrainingSteering, watch_training


@saves_all_keys
class CompiledRunner(AdaptedRunner):
    """The Runner that implements everything a `Compiled` does.

    Args:
        compilation: the Compilation to run.
        make: a function that creates a compiled model for another Compilation.
    """

    def __init__(self, compilation: Compilation, make: Callable[[Compilation], Any]) -> None:
        super().__init__(compilation, compilation.store)
        self._make = make
        vars(self).update(taken_over(compilation.model))

    def __getattr__(self, name: str) -> Any:
        """Return an offered attribute, or one that transformers' generation loop reads.

        Raises:
            NotHereError: GC072 for an attribute that other libraries' models have, with a hint that names the
                equivalent here.
        """
        if name in OFFERED:
            return getattr(OFFERED[name](self), name)
        if name in ELSEWHERE:
            kind = type(self.compilation.model).__name__
            raise NotHereError("GC072", f"a compiled {kind} has no {name}", hint=ELSEWHERE[name])
        return loop_attribute(self, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *OFFERED})

    def compiled_of(self, compilation: Compilation) -> Any:
        """Create a compiled model for another Compilation."""
        return self._make(compilation)

    def adopt(self, module: Root) -> None:
        """Make a module the root of the tree, and keep the base out of its state dicts."""
        super().adopt(module)
        keep_state(module)

    def install(self, key: ProgramKey, program: Program) -> None:
        """Lower a Program to code, and determine the outputs that objectives use."""
        super().install(key, program)
        outputs_of(self.shown.executables[key])

    def entering(self, mode: bool) -> bool:
        """Return the mode; for eval mode, first release everything prepared for training."""
        if not mode:
            TrainingSteering(self).pause()
        return mode

    def results(self, key: ProgramKey, present: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return the flat outputs of a call, with controllers and objectives taking part in training."""
        return TrainingSteering(self).results(key, present)

    def copied(self) -> None:
        """Prepare the Runner of a copied module, whose steering and training progress are copies."""
        super().copied()
        watch_training(self)
        TrainingSteering(self).pause()
