"""Gradients of whole base tensors, for controllers that need them occasionally; none outlives its backward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from graftc.passes.core.packing.gradients import listen, tap_of
from graftc.passes.core.packing.packed_tensor import PackedTensor


class BaseGradients:
    """Passes on the gradient of each base tensor as soon as it is available, then frees it.

    The tensors require gradients from the call to `want` until the call to `release`. Several instances may request
    gradients of the same tensor, provided that all of them release it before any of them requests it again.

    Args:
        receive: a function that is called with a tensor's name and gradient, once per backward pass.
    """

    def __init__(self, receive: Callable[[str, Tensor], None]) -> None:
        self._receive = receive
        self._wanted: dict[str, tuple[Tensor, list[RemovableHandle]]] = {}

    def want(self, tensors: Mapping[str, Tensor]) -> None:
        """Request gradients of these tensors, given by name, in subsequent passes."""
        for name, given in tensors.items():
            tensor = given.parts[0] if isinstance(given, PackedTensor) else given
            previous, handles = self._wanted.get(name, (None, []))
            if not tensor.is_floating_point():  # the codes of a packed weight
                if previous is not tensor or not handles:
                    self._wanted[name] = tensor, [listen(tensor, partial(self._hand_over, name))]
                _let_want(tensor, True)
                continue
            _let_want(tensor, True)
            if previous is not tensor or not handles:
                # The first hook receives the gradient even if another instance's second hook has already run.
                first = tensor.register_hook(partial(self._hand_over, name))  # type: ignore[no-untyped-call]
                second = tensor.register_post_accumulate_grad_hook(_let_go)  # type: ignore[no-untyped-call]
                self._wanted[name] = tensor, [first, second]

    @torch.no_grad()
    def _hand_over(self, name: str, gradient: Tensor) -> None:
        self._receive(name, gradient)

    @property
    def waiting(self) -> bool:
        """Whether `want` has been called since the last `release`."""
        return bool(self._wanted)

    def pause(self) -> None:
        """Stop requesting gradients in new passes; gradients from passes that have already run are still passed on."""
        for name, (tensor, handles) in list(self._wanted.items()):
            _let_want(tensor, False)
            if not handles:
                del self._wanted[name]

    def release(self) -> None:
        """Stop requesting gradients of any tensor, and remove the hooks."""
        self.pause()
        for _, handles in self._wanted.values():
            for handle in handles:
                handle.remove()
        self._wanted.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> BaseGradients:
        """Return a copy for a copied model, which has no pending passes and no hooks on its tensors."""
        copied = BaseGradients(copy.deepcopy(self._receive, memo))
        copied._wanted = {name: (copy.deepcopy(tensor, memo), []) for name, (tensor, _) in self._wanted.items()}
        return copied


def wanted(tensor: Tensor) -> bool:
    """Return whether a base tensor requires a gradient because graftc requested it, not because it was unfrozen."""
    return bool(getattr(tensor, "_graftc_wanted", False))


def _let_want(tensor: Tensor, wants: bool) -> None:
    if tensor.is_floating_point():
        tensor.requires_grad_(wants)
        tensor._graftc_wanted = wants  # type: ignore[attr-defined]
    elif (tap := tap_of(tensor)) is not None:
        tap.open = wants


def _let_go(tensor: Tensor) -> None:
    tensor.grad = None
