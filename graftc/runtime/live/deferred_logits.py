"""Deferred logits, which a head computes only when they are read, so that the head and the loss can be one graph.

The model's own Python calls its head, processes the logits in any way, and computes their cross-entropy. None of this
is known in advance. Therefore, the head of a model that trains with a chunked loss returns a tensor without values,
which records the steps applied to it. If these end in a cross-entropy, the head, the steps and the loss are captured as
one function; if anything else reads a value, the head is called after all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from graftc.compat import pytree
from graftc.compat.tensors import version_of, wrapper
from graftc.passes.core.elements.behind import FLATTENING, LOSS, FollowingCall, ResultNumber, may_follow
from graftc.specs.errors.diagnostics import GraftError

Run = Callable[[Sequence[FollowingCall]], Any]
"""A function that calls a head, applies the given steps to its result, and returns the last result."""

_OF_FORM = frozenset(
    getter
    for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_cuda", "is_leaf", "is_sparse")
    if (getter := getattr(getattr(Tensor, name), "__get__", None)) is not None
) | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point, torch.is_floating_point}
"""Functions that return a tensor's metadata and read no values."""


@dataclass
class _Call:
    """A call to a head that has not run yet.

    Attributes:
        run: the function that makes the call.
        x: the head's input.
        path: the head's path, for messages.
        autocast: the device type, whether autocast is on for it, and the autocast dtype.
        forms: tensors on the meta device for the results of the head and of every step.
        steps: the steps applied to the result so far.
        results: the results of the head and of every step, once any of them has been read.
        versions: the tensors that the call reads, with their versions, which must not change before the call runs.
    """

    run: Run
    x: Tensor
    path: str
    autocast: tuple[str, bool, torch.dtype]
    forms: list[Tensor]
    steps: list[FollowingCall] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)
    versions: list[tuple[Tensor, int]] = field(default_factory=list)

    def goes_on(self, device: torch.device) -> bool:
        """Return whether a step can be added: no result has been read, and the current modes are the call's."""
        return not self.results and torch.is_grad_enabled() and self.autocast == modes_of(device)

    def watch(self, tensors: Sequence[Tensor]) -> None:
        """Record the versions of tensors."""
        self.versions += [(tensor, version_of(tensor)) for tensor in tensors]

    def add(self, step: FollowingCall, form: Tensor) -> ResultNumber:
        """Add a step to run later, with the form of its result, and return the number of that result."""
        self.watch([leaf for leaf in pytree.tree_leaves((step.args, dict(step.kwargs))) if isinstance(leaf, Tensor)])
        self.steps.append(step)
        self.forms.append(form)
        return ResultNumber(len(self.steps))

    def read(self, result: ResultNumber) -> Any:
        """Return a result with its values, after running the call and all steps if necessary."""
        if not self.results:
            with self._as_called():
                self.results.append(self.run(()))
                for step in self.steps:
                    self.results.append(step.run(self.results))
        return self.results[result.number]

    def loss(self, result: ResultNumber, labels: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the loss for a result, computed in one graph with the head.

        Labels for flattened rows are reshaped like the rows of the head's input, because a size that is the product of
        two others would make the graph valid only for these sizes.
        """
        steps, target = list(self.steps), cast(Any, labels)
        form = self.forms[self._unflattened(result).number]
        rows = form.shape[:-1]
        if labels.dim() == 1 and rows == self.x.shape[:-1] and labels.numel() == math.prod(rows):
            steps.append(FollowingCall(Tensor.select, (self.x, -1, 0)))
            steps.append(FollowingCall(Tensor.expand_as, (labels.view(rows), ResultNumber(len(steps)))))
            steps.append(FollowingCall(Tensor.flatten, (ResultNumber(len(steps)),)))
            target = ResultNumber(len(steps))
        with self._as_called():
            return self.run((*steps, FollowingCall(LOSS, (result, target, *args), kwargs)))

    def _unflattened(self, result: ResultNumber) -> ResultNumber:
        """Return the result of which a given result is a flattened view; the result itself if it is not such a view."""
        while result.number and self.steps[result.number - 1].function in FLATTENING:
            result = self.steps[result.number - 1].args[0]
        return result

    @contextmanager
    def _as_called(self) -> Iterator[None]:
        """Run the block in the modes of the call.

        Raises:
            GraftError: GC031 if a tensor that the call reads has been written to since the call.
        """
        if any(version_of(tensor) != version for tensor, version in self.versions):
            message = f"a tensor that {self.path} reads was written to before its logits were read"
            raise GraftError("GC031", message, hint="remove memory: {loss: chunked}")
        device, enabled, dtype = self.autocast
        with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
            yield


class DeferredLogits(Tensor):
    """A tensor of logits, ``[..., vocabulary]`` in the head's dtype, whose values are computed when they are read."""

    _graftc_call: _Call
    _graftc_result: ResultNumber

    @staticmethod
    def of(form: Tensor, device: torch.device, call: _Call, result: ResultNumber) -> DeferredLogits:
        """Create the tensor that represents a result of a call.

        Args:
            form: a tensor on the meta device with the result's shape and dtype.
            device: the device of the result's values.
            call: the call to the head.
            result: the number of the result in that call.
        """
        logits = wrapper(DeferredLogits, form.shape, form.dtype, device, requires_grad=True)
        logits._graftc_call, logits._graftc_result = call, result
        return logits

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Record a function that can follow the head without reading values; for any other, compute the values."""
        named = dict(kwargs or {})
        if func in _OF_FORM:
            with torch.DisableTorchFunctionSubclass():
                return func(*args, **named)
        operands = [leaf for leaf in pytree.tree_leaves((args, named)) if isinstance(leaf, DeferredLogits)]
        first = operands[0]
        alone = len(operands) == 1 and args and args[0] is first
        if alone and may_follow(func) and first._graftc_call.goes_on(first.device):
            result = _noted(first, func, tuple(args[1:]), named)
            if result is not None:
                return result
        args, named = pytree.tree_map(lambda leaf: value_of(leaf), (tuple(args), named))
        return func(*args, **named)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Compute the values for code that calls an operator directly."""
        args, named = pytree.tree_map(lambda leaf: value_of(leaf), (tuple(args), dict(kwargs or {})))
        return func(*args, **named)


def value_of(value: Any) -> Any:
    """Return deferred logits as a tensor with values; return anything else unchanged."""
    if isinstance(value, DeferredLogits):
        return value._graftc_call.read(value._graftc_result)
    return value


def _noted(first: DeferredLogits, func: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Return a function's deferred result, or the loss if the function is a loss; None if the values must be read."""
    call, result = first._graftc_call, first._graftc_result
    if func is Tensor.to:
        args = tuple(each for each in args if each != first.device)
        named = {key: each for key, each in named.items() if key != "device" or each != first.device}
        if not args and not named:
            return first
        if any(not isinstance(each, torch.dtype) for each in (*args, *named.values())):
            return None
    if func is LOSS:
        return call.loss(result, args[0], args[1:], named) if args and isinstance(args[0], Tensor) else None
    step = FollowingCall(func, (result, *args), named)
    if any(isinstance(leaf, Tensor) and leaf.dim() for leaf in pytree.tree_leaves((args, named))):
        return None
    try:
        after = step.run(call.forms)
    except (RuntimeError, TypeError, IndexError):
        return None
    return DeferredLogits.of(after, first.device, call, call.add(step, after))


def modes_of(device: torch.device) -> tuple[str, bool, torch.dtype]:
    """Return a device's type, whether autocast is on for it, and the autocast dtype."""
    return device.type, torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)


def is_head(module: nn.Module) -> bool:
    """Return whether a module may be a vocabulary head: a linear map with more outputs than inputs."""
    return isinstance(module, nn.Linear) and module.out_features > module.in_features


def deferred(run: Run, module: nn.Linear, x: Tensor, path: str) -> DeferredLogits:
    """Return a tensor that represents a head's logits.

    Args:
        run: the function that makes the call.
        module: the head.
        x: ``[..., in_features]``, the head's input.
        path: the head's path, for messages.
    """
    modes = modes_of(x.device)
    form = torch.empty((*x.shape[:-1], module.out_features), dtype=modes[2] if modes[1] else x.dtype, device="meta")
    call = _Call(run, x, path, modes, [form])
    call.watch([x])
    return DeferredLogits.of(form, x.device, call, ResultNumber(0))
