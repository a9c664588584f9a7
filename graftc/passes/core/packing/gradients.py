"""Gradients of whole packed weights, for callers that need them occasionally: the codes themselves have no gradient."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils.hooks import RemovableHandle

from graftc.compat.autograd import after_backward

Receive = Callable[[Tensor], None]
"""A function that is called with a weight's gradient."""

_TAP = "_graftc_tap"


class Tap:
    """Passes the gradients of one packed weight on to receivers.

    Attributes:
        receivers: the functions that receive the gradients, including those from passes that have already run; by
            handle id.
        open: whether subsequent passes provide gradients.
    """

    def __init__(self) -> None:
        self.receivers: OrderedDict[int, Receive] = OrderedDict()
        self.open = False
        self._sum: Tensor | None = None

    def give(self, gradient: Tensor, alone: bool) -> None:
        """Pass on the gradient of one use of the weight.

        If the weight has several uses, the sum of their gradients is passed on at the end of the backward pass.
        """
        if alone:
            self._hand_over(gradient)
        elif self._sum is None:
            self._sum = gradient.clone()
            after_backward(self._finish)
        else:
            self._sum += gradient

    def _finish(self) -> None:
        total, self._sum = self._sum, None
        if total is not None:
            self._hand_over(total)

    def _hand_over(self, gradient: Tensor) -> None:
        with torch.no_grad():
            for receive in list(self.receivers.values()):
                receive(gradient)


def tap_of(codes: Tensor) -> Tap | None:
    """Return the tap of the weight with these codes; None if no receiver has been registered."""
    return cast("Tap | None", getattr(codes, _TAP, None))


def is_open(codes: Tensor) -> bool:
    """Return whether passes provide the gradient of the weight with these codes."""
    tap = tap_of(codes)
    return tap is not None and tap.open


def listen(codes: Tensor, receive: Receive) -> RemovableHandle:
    """Register a receiver of the gradients of the weight with these codes, until the handle is removed."""
    tap = tap_of(codes)
    if tap is None:
        tap = Tap()
        setattr(codes, _TAP, tap)
    handle = RemovableHandle(tap.receivers)
    tap.receivers[handle.id] = receive
    return handle


def pass_on(codes: Tensor, copied: Tensor) -> Tensor:
    """Return ``copied``, which replaces codes but has no values, with the codes' tap attached if the tap is open."""
    if is_open(codes):
        setattr(copied, _TAP, tap_of(codes))
    return copied


def tapped(value: Tensor, codes: Tensor, alone: bool) -> Tensor:
    """Return a weight's values in such a way that their gradient is passed on if the weight's tap is open.

    Args:
        value: the values, computed from the codes.
        codes: the codes of the weight.
        alone: whether this is the weight's only use in a pass.
    """
    tap = tap_of(codes)
    if tap is None or not tap.open or not torch.is_grad_enabled():
        return value
    wants = torch.zeros((), device=value.device, requires_grad=True)
    return cast("Tensor", _Tapped.apply(value, wants, tap, alone))  # type: ignore[no-untyped-call]


class _Tapped(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, wants: Tensor, tap: Tap, alone: bool) -> Tensor:
        ctx.tap, ctx.alone = tap, alone
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None, None]:
        ctx.tap.give(gradients[0], ctx.alone)
        return None, None, None, None
