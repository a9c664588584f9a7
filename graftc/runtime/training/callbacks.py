"""Callbacks for the transformers Trainer."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, cast

from graftc.runtime.training.watching import Watch, is_plain, watch

if TYPE_CHECKING:
    from transformers import TrainerCallback


class StepLog(Protocol):
    """The interface that the logging callback writes to; `TrainingLog` implements it."""

    def expect(self, number: int) -> None:
        """Announce the number of the next step."""

    def step(self, number: int | None = None, /, **values: Any) -> bool:
        """Record that an optimiser step has been taken."""

    def note(self, number: int, /, **values: Any) -> None:
        """Write numbers to the log."""

    def close(self) -> None:
        """Stop observing: later forward passes do not belong to the training."""


def steering_callback(compiled: Any) -> TrainerCallback:
    """Return a callback that adds objectives and lets controllers step, once per optimiser step.

    Args:
        compiled: a compiled model, or its Runner.
    """
    return cast("TrainerCallback", _of_trainer(_Steering)(compiled))


def logging_callback(log: StepLog) -> TrainerCallback:
    """Return a callback that writes a training log: figures after optimiser steps, and what the Trainer logs."""
    return cast("TrainerCallback", _of_trainer(_Logging)(log))


@cache
def _of_trainer(kind: type) -> Any:
    """Return a class of callbacks as a subclass of transformers' `TrainerCallback`."""
    from transformers import TrainerCallback

    return type(kind.__name__, (kind, TrainerCallback), {"__doc__": kind.__doc__, "__module__": __name__})


class _Logging:
    """A callback that passes the Trainer's steps and logs to a `StepLog`; the Trainer logs after the step itself."""

    def __init__(self, log: StepLog) -> None:
        self.log = log

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Announce the first step, whose number the Trainer knows."""
        self.log.expect(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Record the step, after the optimiser and the controllers."""
        self.log.step(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Write what the Trainer logs about training and evaluation."""
        kept = {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)}
        self.log.note(state.global_step, **{n: v for n, v in kept.items() if n not in ("step", "time", "figures")})

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop observing: later forward passes do not belong to the training."""
        self.log.close()


class _Steering:
    """A callback that steers the training of a compiled model.

    Objectives depend on adapter tensors only, so their gradient is computed once, before that of the first micro-batch,
    and both are clipped together. When a gradient scaler skips a step, controllers skip it as well.
    """

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        self._check: Watch | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Announce the number of steps that are left, and watch the first steps of the optimiser."""
        self.compiled.steps_left(state.max_steps - state.global_step)
        if self._check is not None:  # left over from an abandoned attempt
            self._check.remove()
        self._check = watch(self.compiled, optimizer) if is_plain(optimizer) else None

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Compute the gradient of the objectives, before the micro-batches of an optimiser step."""
        extra = self.compiled.extra_loss()
        if extra.requires_grad:
            scaler = getattr(optimizer, "scaler", None)
            (extra if scaler is None else scaler.scale(extra)).backward()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Let the controllers step, between the optimiser's step and the zeroing of gradients."""
        if getattr(optimizer, "step_was_skipped", False):
            self.compiled.skip_step()
            # The schedule ends with the training nevertheless.
            self.compiled.steps_left(state.max_steps - state.global_step - 1)
            return
        self.compiled.after_step()
