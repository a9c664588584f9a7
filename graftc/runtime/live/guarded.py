"""Guards for adapted tensors: between graphs, the model's own Python may read their metadata, but not their values.

The adaptation is in the graphs, so code that reads the values would compute with the base's values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from graftc.compat import pytree
from graftc.passes.core.packing.packing import weight_name
from graftc.runtime.live.element_run import GraphRunner
from graftc.specs.errors.diagnostics import GraftError

RUNNING: ContextVar[GraphRunner] = ContextVar("live runner")
"""The Runner that calls the live model in this thread."""

_PROPERTIES = (
    *("device", "dtype", "grad", "grad_fn", "is_cpu", "is_cuda", "is_leaf", "is_meta", "is_quantized", "is_sparse"),
    *("itemsize", "layout", "nbytes", "ndim", "requires_grad", "shape"),
)
_METHODS = (
    *("__len__", "__repr__", "dim", "element_size", "get_device", "is_complex", "is_contiguous", "is_floating_point"),
    *("nelement", "numel", "requires_grad_", "size", "stride"),
)
_FUNCTIONS = (torch.is_complex, torch.is_floating_point, torch.numel)
_ALLOWED: frozenset[object] = frozenset(
    [getattr(Tensor, name).__get__ for name in _PROPERTIES]
    + [getattr(Tensor, name) for name in _METHODS]
    + list(_FUNCTIONS)
)
"""Functions that read no values."""
_SAME: tuple[object, ...] = (Tensor.data.__get__, Tensor.detach, torch.ops.graftc.unpack)  # type: ignore[attr-defined]
"""Functions that return the same tensor, or the packed weight whose parts they are given."""


def _writes(func: Callable[..., Any]) -> bool:
    """Return whether a function writes to its first argument.

    Writing is allowed: models clamp weights to bounds that the weights already satisfy, which changes nothing.
    """
    name = getattr(func, "__name__", "")
    return name.endswith("_") and not name.endswith("__")


class Guarded(torch.Tensor):
    """A tensor of the Store whose values must not be read during a call, unless the base alone is called."""

    _graftc_name: str
    _graftc_adaptations: tuple[str, ...]

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a torch function.

        Raises:
            GraftError: GC031 if it reads a value that the running model adapts.
        """
        options = kwargs or {}
        if func in _SAME:
            with torch.DisableTorchFunctionSubclass():
                held: Any = args[0] if isinstance(args[0], Tensor) else args[0][0]
                return guarded(func(*args, **options), weight_name(held._graftc_name), held._graftc_adaptations)
        if func not in _ALLOWED:
            read = pytree.tree_leaves((args[1:] if _writes(func) else args, dict(options)))
            _refuse_adapted(leaf for leaf in read if isinstance(leaf, Guarded))
        with torch.DisableTorchFunctionSubclass():
            return func(*args, **options)


def guarded(tensor: Tensor, name: str, adaptations: tuple[str, ...]) -> Tensor:
    """Return a guarded tensor over the same storage.

    Args:
        tensor: a tensor of the Store.
        name: the tensor's name in the Store.
        adaptations: the names of the adaptations that change the tensor.
    """
    guard = tensor.detach().as_subclass(Guarded)
    guard._graftc_name, guard._graftc_adaptations = name, adaptations
    return guard


def runs_base(runner: GraphRunner) -> bool:
    """Return whether the base alone is called, in which case updated values are ignored and nothing is updated."""
    return bool(getattr(runner, "base_only", False))


def _refuse_adapted(tensors: Iterable[Guarded]) -> None:
    runner = RUNNING.get(None)
    if runner is None or runs_base(runner):
        return
    for tensor in tensors:
        applied = next(filter(runner.applies, tensor._graftc_adaptations), None)
        if applied is not None:
            message = f"the model's own Python reads {tensor._graftc_name} between graphs, but {applied!r} adapts it"
            raise GraftError("GC031", message, hint="do not adapt it, or let the model call the module instead")
