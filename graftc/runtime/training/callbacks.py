"""Callbacks for the transformers Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from transformers import TrainerCallback

from graftc.runtime.model.blocks import Runner
from graftc.runtime.training.watching import Watch, is_plain, watch

if TYPE_CHECKING:
    from graftc.runtime.training.steering import Steered


def steering_callback(compiled: Steered) -> TrainerCallback:
    """A callback that adds objectives and lets controllers step, once per optimiser step."""
    return _Steering(compiled)


class _Steering(TrainerCallback):
    """Objectives depend on adapter tensors only, so their gradient is taken once, before that of the first micro-batch,
    and both are clipped as one. Where a gradient scaler has left a step out, controllers leave it out too."""

    def __init__(self, compiled: Steered) -> None:
        self.compiled = compiled
        self._check: Watch | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """The Trainer knows how long it will be, and has an optimiser whose first steps are looked at."""
        self.compiled.steps_left(state.max_steps - state.global_step)
        if self._check is not None:  # of an attempt that has been given up
            self._check.remove()
        self._check = watch(cast(Runner, self.compiled), optimizer) if is_plain(optimizer) else None

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Before the micro-batches of an optimiser step."""
        extra = self.compiled.extra_loss()
        if extra.requires_grad:
            scaler = getattr(optimizer, "scaler", None)
            (extra if scaler is None else scaler.scale(extra)).backward()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Between the optimiser's step and the zeroing of gradients."""
        if getattr(optimizer, "step_was_skipped", False):
            self.compiled.skip_step()
            # The schedule ends with the training all the same.
            self.compiled.steps_left(state.max_steps - state.global_step - 1)
            return
        self.compiled.after_step()
