"""The callback that steers training in the transformers Trainer."""

from __future__ import annotations

from functools import cache
from typing import Any

from graftc.runtime.training.watching import Watch, is_plain, watch


@cache
def for_trainer(kind: type) -> Any:
    """Return a class derived from both a callback class and transformers' `TrainerCallback`."""
    from transformers import TrainerCallback

    return type(kind.__name__, (kind, TrainerCallback), {"__doc__": kind.__doc__, "__module__": kind.__module__})


class SteeringCallback:
    """A callback that steers the training of a compiled model.

    Objectives depend only on adapter tensors, so their gradient is computed once per step, before that of the first
    micro-batch, and both are clipped together. When a gradient scaler skips a step, controllers skip it as well.
    """

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        self._check: Watch | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Pass the number of remaining steps to the controllers, and watch the optimiser's first steps."""
        self.compiled.steps_left(state.max_steps - state.global_step)
        if self._check is not None:  # left over from an abandoned attempt
            self._check.remove()
        self._check = watch(self.compiled, optimizer) if is_plain(optimizer) else None

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Compute the gradient of the objectives before the micro-batches of an optimiser step."""
        extra = self.compiled.extra_loss()
        if extra.requires_grad:
            scaler = getattr(optimizer, "scaler", None)
            (extra if scaler is None else scaler.scale(extra)).backward()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Run the controllers, after the optimiser's step and before gradients are zeroed."""
        if getattr(optimizer, "step_was_skipped", False):
            self.compiled.skip_step()
            # The schedule still ends with the training run.
            self.compiled.steps_left(state.max_steps - state.global_step - 1)
            return
        self.compiled.after_step()
