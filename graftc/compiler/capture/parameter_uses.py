"""Observe how operators use a model's parameters: record reads, and refuse writes that change values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from graftc.compat import pytree
from graftc.compat.modes import TorchDispatchMode
from graftc.compat.operators import schema_of
from graftc.passes.core.ops.unpack import UNPACK
from graftc.specs.errors.diagnostics import GraftError


@contextmanager
def observed(mode: TorchDispatchMode) -> Iterator[None]:
    """Run the block under a mode that sees the operators that a model calls.

    Code that would compile itself runs eagerly meanwhile: under a mode, Dynamo caches its version of an operator that
    contains code, and cannot trace the operator afterwards.
    """
    with torch.compiler.set_stance("force_eager"), mode:
        yield


class ParameterUses(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that records which of a model's parameters operators read while ``recording`` returns true.

    Computing a packed weight is not a read of it, but reading the values is a read of its first part.
    Writing different values to a parameter raises GC030 and has no effect.

    Args:
        model: the model whose parameters are observed.
        recording: a function that returns whether to record reads now.

    Attributes:
        read: names of the parameters that were read, in order.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, recording: Callable[[], bool] = lambda: False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.read: dict[str, None] = {}
        self._model, self._recording = type(model).__name__, recording
        by_memory = {memory_of(parameter): name for name, parameter in model.named_parameters()}
        self._names = {memory: name for memory, name in by_memory.items() if memory}  # 0 for wrapped and empty ones
        self._values: dict[int, tuple[Any, str]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if func is UNPACK:
            values = func(*args, **options)
            if (name := self._name(args[0][0])) is not None:
                self._values[memory_of(values)] = _reference(values), name
            return values
        schema = schema_of(func) if isinstance(func, torch._ops.OpOverload) else None
        written = self._written(schema, args, options) if schema is not None and schema.is_mutable else {}
        if written:
            return self._tried(func, args, options, written)
        if self._recording() and not _is_view(schema):
            tensors = (leaf for leaf in pytree.tree_leaves((args, options)) if isinstance(leaf, Tensor))
            self.read |= {name: None for tensor in tensors if (name := self._name(tensor)) is not None}
        return func(*args, **options)

    def _written(self, schema: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> dict[str, tuple[str, Tensor]]:
        """Return the names and tensors of the parameters that an operator writes to, by argument name."""
        written: dict[str, tuple[str, Tensor]] = {}
        for index, argument in enumerate(schema.arguments):
            value = args[index] if index < len(args) else options.get(argument.name)
            if argument.is_write and isinstance(value, Tensor) and (name := self._name(value)) is not None:
                written[argument.name] = name, value
        return written

    def _tried(
        self, func: Any, args: tuple[Any, ...], options: Mapping[str, Any], written: Mapping[str, tuple[str, Tensor]]
    ) -> Any:
        """Run an operator that writes to parameters on copies of them, and return its result if no value changes.

        An example is a clamp of weights that are already within its bounds.

        Raises:
            GraftError: GC030 if it would change a value.
        """
        copies = {id(tensor): tensor.clone() for _, tensor in written.values()}
        originals = {id(copies[id(tensor)]): tensor for _, tensor in written.values()}
        swapped = pytree.tree_map(lambda leaf: copies.get(id(leaf), leaf), (args, dict(options)))
        result = func(*swapped[0], **swapped[1])
        for name, tensor in written.values():
            if not torch.equal(copies[id(tensor)], tensor):
                hint = "a forward pass may change buffers, but nothing else"
                raise GraftError("GC030", f"the Python of {self._model} writes to the parameter {name}", hint=hint)
        return pytree.tree_map(lambda leaf: originals.get(id(leaf), leaf), result)

    def _name(self, tensor: Tensor) -> str | None:
        memory = memory_of(tensor) if tensor.numel() else 0
        if memory in self._values and not self._values[memory][0].expired():
            return self._values[memory][1]
        return self._names.get(memory)


def _is_view(schema: Any) -> bool:
    """Return whether an operator only returns another view of a tensor."""
    return schema is not None and any(result.alias_info is not None for result in schema.returns)


def _reference(tensor: Tensor) -> Any:
    """Return a weak reference to a tensor's memory, which may be that of another tensor afterwards."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def memory_of(tensor: Tensor) -> int:
    """Return the address of a tensor's memory, which views share; 0 on the meta device."""
    return tensor.untyped_storage().data_ptr()
