"""Callbacks for the transformers Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from graftc.runtime.steering import Steered


def steering_callback(compiled: Steered) -> TrainerCallback:
    """A callback that adds objectives and lets controllers step, once per optimiser step."""
    return _Steering(compiled)


class _Steering(TrainerCallback):
    """Objectives depend on adapter tensors only, so their gradient is added once, before the optimiser steps: after
    gradients are clipped, and however many micro-batches there were."""

    def __init__(self, compiled: Steered) -> None:
        self.compiled = compiled

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The Trainer knows how long it will be."""
        self.compiled.begin(state.max_steps)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Gradients of the objectives join those of the loss."""
        extra = self.compiled.extra_loss()
        if extra.requires_grad:
            extra.backward()  # type: ignore[no-untyped-call]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Between the optimiser's step and the zeroing of gradients."""
        self.compiled.after_step()
