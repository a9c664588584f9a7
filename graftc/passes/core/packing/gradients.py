"""Gradients of packed weights as wholes, for who looks at them now and then: codes have none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

Receive = Callable[[Tensor], None]
"""Gets the gradient of a weight."""

_TAP = "_graftc_tap"


class Tap:
    """Hands over the gradients of one packed weight.

    Attributes:
        receivers: who gets them, also those of passes that have been run.
        open: whether the passes that follow give any.
    """

    def __init__(self) -> None:
        self.receivers: list[Receive] = []
        self.open = False
        self._sum: Tensor | None = None

    def give(self, gradient: Tensor, alone: bool) -> None:
        """Take the gradient of one use of the weight. That of one with several uses is handed over when all have been
        added up, at the end of the backward pass."""
        if alone:
            self._hand_over(gradient)
        elif self._sum is None:
            self._sum = gradient.clone()
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        else:
            self._sum += gradient

    def _finish(self) -> None:
        found, self._sum = self._sum, None
        if found is not None:
            self._hand_over(found)

    def _hand_over(self, gradient: Tensor) -> None:
        with torch.no_grad():
            for receive in list(self.receivers):
                receive(gradient)


class Removable:
    """What `listen` gives: ends it."""

    def __init__(self, tap: Tap, receive: Receive) -> None:
        self._tap, self._receive = tap, receive

    def remove(self) -> None:
        """Hand over nothing any more."""
        if self._receive in self._tap.receivers:
            self._tap.receivers.remove(self._receive)


def tap_of(codes: Tensor) -> Tap | None:
    """That of the weight with these codes, where somebody has listened to it."""
    found: Tap | None = getattr(codes, _TAP, None)
    return found


def is_open(codes: Tensor) -> bool:
    """Whether passes give the gradient of the weight with these codes."""
    tap = tap_of(codes)
    return tap is not None and tap.open


def listen(codes: Tensor, receive: Receive) -> Removable:
    """Let somebody have the gradients of the weight with these codes."""
    tap = tap_of(codes)
    if tap is None:
        tap = Tap()
        setattr(codes, _TAP, tap)
    tap.receivers.append(receive)
    return Removable(tap, receive)


def pass_on(codes: Tensor, copied: Tensor) -> Tensor:
    """Let what stands for codes, without values, be as open as they are."""
    if is_open(codes):
        setattr(copied, _TAP, tap_of(codes))
    return copied


def tapped(value: Tensor, codes: Tensor, alone: bool) -> Tensor:
    """The values of a weight, whose gradient is handed over where somebody wants it.

    Args:
        value: made of the codes.
        codes: of the weight.
        alone: this is its only use in a pass.
    """
    tap = tap_of(codes)
    if tap is None or not tap.open or not torch.is_grad_enabled():
        return value
    wants = torch.zeros((), device=value.device, requires_grad=True)
    made: Tensor = _Tapped.apply(value, wants, tap, alone)  # type: ignore[no-untyped-call]
    return made


class _Tapped(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, wants: Tensor, tap: Tap, alone: bool) -> Tensor:
        ctx.tap, ctx.alone = tap, alone
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None, None]:
        ctx.tap.give(gradients[0], ctx.alone)
        return None, None, None, None
