"""Controllers with a schedule over the whole training run, whose length the spec may set."""

from __future__ import annotations

from typing import Any, TypeVar

from graftc.passes.core.method.steering import Controller
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.methods.adalora import AdaLoRA
from graftc.specs.methods.pruning import Pruning
from graftc.specs.methods.spiel import SpIEL

S = TypeVar("S", AdaLoRA, Pruning, SpIEL)


class ScheduledController(Controller[S]):
    """Controller that knows the number of optimiser steps from the start if its spec has ``total_steps``."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if self.spec.total_steps is not None:
            self.begin(self.spec.total_steps)

    def begin(self, total: int) -> None:
        """Set the number of optimiser steps; ``total_steps`` of the spec takes precedence.

        Raises:
            GraftError: GC026 if the schedule does not fit into that number of steps.
        """
        total = self.spec.total_steps or total
        self.check_length(total)
        super().begin(total)

    def check_length(self, total: int) -> None:
        """Check that the schedule fits into a number of optimiser steps.

        Raises:
            GraftError: GC026 if it does not.
        """


def check_phases(spec: AdaLoRA | Pruning, total: int) -> None:
    """Check that the phases of a schedule fit into the number of optimiser steps.

    Raises:
        GraftError: GC026 if they leave no step for pruning.
    """
    if spec.warmup_steps + spec.final_steps >= total:
        raise GraftError(
            "GC026",
            f"{spec.name!r} has {spec.warmup_steps} warm-up steps and {spec.final_steps} final steps, which leave none "
            f"of the {total} steps for pruning",
            place=Place(path="warmup_steps" if spec.warmup_steps else "final_steps"),
            hint="lower warmup_steps or final_steps, or train longer",
        )
