"""Training beside the graph: what a loop, or the transformers Trainer, has to call for controllers and objectives."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graftc.compiler.pipeline import Compilation
from graftc.compiler.report import owner_of
from graftc.compiler.steering import Steerings, steerings
from graftc.specs.diagnostics import warn

if TYPE_CHECKING:
    from transformers import TrainerCallback


class Steered:
    """The part of `Compiled` that steers training."""

    _compilation: Compilation
    _used = True

    @cached_property
    def _steering(self) -> Steerings:
        return steerings(self._compilation)

    def begin(self, total_steps: int) -> None:
        """Say how many optimiser steps the training has, for adaptations with a schedule.

        Args:
            total_steps: in all, those before a resume included.
        """
        for controller in self._steering.controllers.values():
            controller.begin(total_steps)

    def extra_loss(self) -> Tensor:
        """The sum of the objectives of all adaptations, a scalar to add to the loss once per optimiser step; 0 where
        there are none."""
        self._used = True
        terms = [objective.value() for objective in self._steering.objectives.values()]
        if not terms:
            device = next((t.device for _, t in self._compilation.store.base()), torch.device("cpu"))
            return torch.zeros((), device=device)
        return torch.stack([term.float() for term in terms]).sum()

    def after_step(self) -> None:
        """What adaptations do between optimiser steps: call it after ``optimizer.step()`` and before
        ``optimizer.zero_grad()``.

        Raises:
            GraftError: GC026 where an adaptation has a schedule and nobody has called `begin`.
        """
        if self._steering.objectives and not self._used:
            names = ", ".join(map(repr, self._steering.objectives))
            warn("GC025", f"{names} has an objective, and the loss was without it", hint="add compiled.extra_loss()")
        self._used = not self._steering.objectives
        for controller in self._steering.controllers.values():
            controller.after_step()

    def callback(self) -> TrainerCallback:
        """A callback for the transformers Trainer that does all of this."""
        from graftc.runtime.callbacks import steering_callback

        return steering_callback(self)

    def warn_of_unsteered(self) -> None:
        """Warn of adaptations that were trained and never steered: their method is another without."""
        for name, controller in self._steering.controllers.items():
            own = (t for n, t in self._compilation.store.adapters() if owner_of(n) == name)
            if controller.steps == 0 and any(t.grad is not None for t in own):
                hint = "call compiled.after_step() after each optimiser step, or give the Trainer compiled.callback()"
                warn("GC025", f"{name!r} was trained without what it does between optimiser steps", hint=hint)
