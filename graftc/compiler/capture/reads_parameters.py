"""A run of a model in which its parameters cannot be written to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from graftc.specs.errors.diagnostics import GraftError


@contextmanager
def reads_parameters(model: nn.Module) -> Iterator[None]:
    """Inside, a write to a parameter of a model is an error, GC030, and does not happen.

    Args:
        model: whose parameters.
    """
    with observed(_ReadsParameters(model)):
        yield


@contextmanager
def observed(mode: TorchDispatchMode) -> Iterator[None]:
    """Inside, a mode sees what operators a model calls. What would compile itself then runs as it is: Dynamo keeps what
    it made of an operator that holds code under a mode, and cannot trace it afterwards."""
    with torch.compiler.set_stance("force_eager"), mode:
        yield


class _ReadsParameters(TorchDispatchMode):  # type: ignore[no-untyped-call]
    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model = type(model).__name__
        held = {_memory(parameter): name for name, parameter in model.named_parameters()}
        self._names = {memory: name for memory, name in held.items() if memory}  # wrapped and empty ones have none

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if getattr(func, "_schema", None) is not None and func._schema.is_mutable:
            for index, argument in enumerate(func._schema.arguments):
                value = args[index] if index < len(args) else given.get(argument.name)
                if argument.is_write and isinstance(value, Tensor) and value.numel():
                    self._require_no_parameter(value)
        return func(*args, **given)

    def _require_no_parameter(self, tensor: Tensor) -> None:
        name = self._names.get(_memory(tensor))
        if name is not None:
            hint = "a forward may change buffers, and nothing else"
            raise GraftError("GC030", f"the Python of {self._model} writes to the parameter {name}", hint=hint)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
