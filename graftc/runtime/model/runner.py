"""Modules that run a Compilation's Programs with the source model's interface."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, Generic, NoReturn, ParamSpec, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from graftc.compat.modules import applied_by
from graftc.passes.core.weights.containers import (
    OWN,
    constant,
    require_types,
)
from graftc.runtime.model.libraries import refuse_pickling
from graftc.runtime.model.model_runner import ModelRunner
from graftc.runtime.model.root import Root, Runner
from graftc.specs.errors.arguments import kind_of
from graftc.specs.errors.diagnostics import GraftError

P = ParamSpec("P")
R = TypeVar("R")

if TYPE_CHECKING:
    from typing_extensions import TypeVar as DefaultingTypeVar

    M = DefaultingTypeVar("M", bound=nn.Module, default=Any, covariant=True)
else:
    M = TypeVar("M", bound=nn.Module, covariant=True)
"""The class of a source model; `Any` if it is unknown."""
Source = TypeVar("Source", bound=nn.Module)
"""The class of a source model that is passed as an argument."""


class Published(Generic[P, R]):
    """Descriptor that exposes a Runner's method on its module under the same name, whatever children the module has."""

    def __init__(self, method: Callable[Concatenate[Any, P], R]) -> None:
        self.__wrapped__, self.__doc__, self.__name__ = method, method.__doc__, method.__name__

    def __get__(self, module: Root | None, owner: type[Root]) -> Callable[P, R]:
        return cast(Callable[P, R], self.__wrapped__ if module is None else getattr(module._graftc, self.__name__))


def runner_of(module: nn.Module | Runner) -> Any:
    """Return the Runner of a compiled or merged model.

    It has everything that graftc offers, even under names that children of the source model hide.

    Raises:
        GraftError: GC073 for anything else.
    """
    runner = module if isinstance(module, Runner) else getattr(module, "__dict__", {}).get(OWN)
    if runner is None:
        raise GraftError(
            "GC073", f"expected a compiled model, got {kind_of(module)}", hint="pass the result of graftc.compile"
        )
    return runner


def _moved(root: ModelRoot, fn: Callable[[Tensor], Tensor], convert: Callable[[], Any]) -> Any:
    """Move the tensors and retarget the graphs; refuse another dtype, which would require another capture."""
    runner = root._graftc
    moved = fn(torch.empty(0, dtype=runner.dtype, device=runner.device))
    if moved.dtype != runner.dtype:
        message = f"the graphs were captured in {runner.dtype} and cannot run in {moved.dtype}"
        raise GraftError("GC033", message, hint=f"load the base model in {moved.dtype} and compile that")
    require_types(root, fn)
    before = runner.device
    result = convert()
    if runner.device != before:
        runner.relower()
    return result


@applied_by(_moved)
class ModelRoot(Root):
    """A module with a source model's interface."""

    _graftc: ModelRunner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs of a call, in the source model's output class."""
        return self._graftc.call(args, kwargs)

    def train(self, mode: bool = True) -> Self:
        """Set the mode that the Runner chooses when ``mode`` is requested."""
        super().train(self._graftc.entering(mode))
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; warn if the source model has it, since graphs contain its value as a constant (GC048)."""
        super().__setattr__(name, value)
        own = vars(self).get(OWN)
        if own is not None and name in own.constants and value != own.constants[name]:
            constant(self, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return a model with its own tensors, including the base's; ties are preserved.

        The graphs, which contain no tensors, are shared, as is the source model, from which new signatures are
        captured.
        """
        memo.update((id(item), item) for item in self._graftc.shared())
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        # A forward that has been replaced calls the original model.
        with self._graftc.store.changes.still():
            vars(copied).update(copy.deepcopy({n: v for n, v in vars(self).items() if n != "forward"}, memo))
        copied._graftc.copied()
        return copied

    def __copy__(self) -> Self:
        """Return a second handle on the same tensors and graphs."""
        copied = type(self).__new__(type(self))
        vars(copied).update(vars(self))
        return copied

    def __getstate__(self) -> NoReturn:
        """Refuse `pickle` and `torch.save` with GC074, which explains how to save a model."""
        refuse_pickling(self)
