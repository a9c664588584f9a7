"""Gradients of base tensors as a whole, for controllers that look at them now and then: none outlives its backward
pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle


class BaseGradients:
    """Hands over the gradients of base tensors, each as soon as it is there, and lets it go.

    The tensors want a gradient from `want` until `release`. Several may want those of one tensor, if all of them
    release them before any other wants them again.

    Args:
        receive: gets a tensor's name and its gradient, once for each backward pass.
    """

    def __init__(self, receive: Callable[[str, Tensor], None]) -> None:
        self._receive = receive
        self._held: dict[str, tuple[Tensor, list[RemovableHandle]]] = {}

    def want(self, tensors: Mapping[str, Tensor]) -> None:
        """Let tensors, by name, have gradients in the passes that follow."""
        for name, tensor in tensors.items():
            tensor.requires_grad_(True)
            tensor._graftc_wanted = True  # type: ignore[attr-defined]
            held, handles = self._held.get(name, (None, []))
            if held is not tensor or not handles:
                # The first hook gets the gradient even where another holder's second one has been there already.
                first = tensor.register_hook(partial(self._hand_over, name))  # type: ignore[no-untyped-call]
                second = tensor.register_post_accumulate_grad_hook(_let_go)  # type: ignore[no-untyped-call]
                self._held[name] = tensor, [first, second]

    @torch.no_grad()
    def _hand_over(self, name: str, gradient: Tensor) -> None:
        self._receive(name, gradient)

    @property
    def waiting(self) -> bool:
        """Whether there has been a `want` since the last `release`."""
        return bool(self._held)

    def pause(self) -> None:
        """No further pass shall give gradients; those of passes that have been run are still handed over."""
        for name, (tensor, handles) in list(self._held.items()):
            tensor.requires_grad_(False)
            tensor._graftc_wanted = False  # type: ignore[attr-defined]
            if not handles:
                del self._held[name]

    def release(self) -> None:
        """Want nothing any more."""
        self.pause()
        for _, handles in self._held.values():
            for handle in handles:
                handle.remove()
        self._held.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> BaseGradients:
        """A copied model has no passes whose gradients could come, and its tensors have no hooks."""
        copied = BaseGradients(copy.deepcopy(self._receive, memo))
        copied._held = {name: (copy.deepcopy(tensor, memo), []) for name, (tensor, _) in self._held.items()}
        return copied


def wanted(tensor: Tensor) -> bool:
    """Whether a base tensor wants a gradient because graftc does, and not because somebody has unfrozen it."""
    return bool(getattr(tensor, "_graftc_wanted", False))


def _let_go(tensor: Tensor) -> None:
    tensor.grad = None
