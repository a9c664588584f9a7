"""Callbacks for the transformers Trainer."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, cast

from graftc.runtime.training.watching import Watch, is_plain, watch

if TYPE_CHECKING:
    from transformers import TrainerCallback


class StepLog(Protocol):
    """What is written while training: see `TrainingLog`."""

    def expect(self, number: int) -> None:
        """Say which step is the next."""

    def step(self, number: int | None = None, /, **values: Any) -> bool:
        """Say that an optimiser step has been taken."""

    def note(self, number: int, /, **values: Any) -> None:
        """Write numbers down."""

    def close(self) -> None:
        """Say that forward passes are those of something else."""


def steering_callback(compiled: Any) -> TrainerCallback:
    """A callback that adds objectives and lets controllers step, once per optimiser step.

    Args:
        compiled: a compiled model, or its Runner.
    """
    return cast("TrainerCallback", _of_trainer(_Steering)(compiled))


def logging_callback(log: StepLog) -> TrainerCallback:
    """A callback that writes a training log: figures after optimiser steps, and what the Trainer logs."""
    return cast("TrainerCallback", _of_trainer(_Logging)(log))


@cache
def _of_trainer(kind: type) -> Any:
    """A class of callbacks as one of transformers'."""
    from transformers import TrainerCallback

    return type(kind.__name__, (kind, TrainerCallback), {"__doc__": kind.__doc__, "__module__": __name__})


class _Logging:
    """The Trainer counts steps, and logs after the step that it logs."""

    def __init__(self, log: StepLog) -> None:
        self.log = log

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The Trainer knows which step is the first."""
        self.log.expect(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After the optimiser's step, and what controllers do."""
        self.log.step(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """What the Trainer logs of training and evaluation."""
        kept = {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)}
        self.log.note(state.global_step, **{n: v for n, v in kept.items() if n not in ("step", "time", "figures")})

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forward passes are those of something else."""
        self.log.close()


class _Steering:
    """Objectives depend on adapter tensors only, so their gradient is taken once, before that of the first micro-batch,
    and both are clipped as one. Where a gradient scaler has left a step out, controllers leave it out too."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        self._check: Watch | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """The Trainer knows how long it will be, and has an optimiser whose first steps are looked at."""
        self.compiled.steps_left(state.max_steps - state.global_step)
        if self._check is not None:  # of an attempt that has been given up
            self._check.remove()
        self._check = watch(self.compiled, optimizer) if is_plain(optimizer) else None

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
