"""The cache returned by a call that did not request one; its contents are computed when it is first used.

If a source model's config sets ``use_cache``, its calls return a cache. Most callers ignore it, and returning keys and
values would require capturing one more graph, so these calls run the graph without them. The cache that they return is
an empty transformers cache. When it is used, its contents are computed by a second pass over the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from graftc.compat.caches import CACHES
from graftc.compat.tensors import version_of
from graftc.compiler.capture.interface import Interface
from graftc.compiler.capture.past import ENCODER, USE_CACHE, new_cache
from graftc.specs.errors.diagnostics import GraftError

_HINT = "call with use_cache=True, which creates the cache at once"


@dataclass(frozen=True)
class CallState:
    """The state of a call that a second pass has to reproduce.

    Attributes:
        inputs: the call's inputs, by name.
        versions: the versions of its tensors, and values that show whether adapter tensors have been written to.
        now: a function that returns the current `versions`.
        grad: whether gradients were recorded.
        inference: whether inference mode was on.
        autocast: the autocast dtype; None if autocast was off.
        device: the device type that autocast applied to.
    """

    inputs: Mapping[str, Any]
    versions: tuple[Any, ...]
    now: Callable[[], tuple[Any, ...]]
    grad: bool
    inference: bool
    autocast: torch.dtype | None
    device: str

    @classmethod
    def of(cls, inputs: Mapping[str, Any], tensors: Callable[[], tuple[Any, ...]], device: str) -> CallState:
        """Record the state of a call.

        Args:
            inputs: the inputs of the call, by name. Inference tensors are copied, since writes to them are not counted.
            tensors: a function that returns values that show whether adapter tensors have been written to.
            device: the type of the model's device.
        """
        kept = {n: v.clone() if isinstance(v, Tensor) and v.is_inference() else v for n, v in inputs.items()}
        watched = [v for v in kept.values() if isinstance(v, Tensor) and not v.is_inference()]

        def now() -> tuple[Any, ...]:
            return (*(version_of(tensor) for tensor in watched), *tensors())

        on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        autocast = torch.get_autocast_dtype(device) if on else None
        return cls(kept, now(), now, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, device)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Restore the torch modes of the recorded call while the block runs.

        Raises:
            GraftError: GC140 if inputs or adapter tensors have been written to since, or hooks have changed.
        """
        if self.now() != self.versions:
            message = "a call's cache is created when it is first used, but a tensor that the call read has been "
            message += "written to since, or hooks have changed"
            raise GraftError("GC140", message, hint=_HINT)
        autocast: AbstractContextManager[Any] = nullcontext()
        if torch.amp.is_autocast_available(self.device):
            autocast = torch.autocast(self.device, self.autocast, enabled=self.autocast is not None)
        with torch.inference_mode(self.inference), torch.set_grad_enabled(self.grad), autocast:
            yield


class _Deferred:
    """A cache that creates its contents and becomes an ordinary cache when one of its attributes is first read."""

    def __getattr__(self, name: str) -> Any:
        kind = type(self).__mro__[2]
        if name not in _attributes(kind):
            raise AttributeError(f"{kind.__name__!r} object has no attribute {name!r}", name=name, obj=self)
        make = vars(self).get("_graftc_make")
        if make is not None:  # otherwise another thread has created the contents
            contents = make()
            vars(self).update({**vars(contents), **vars(self)})
            self.__class__ = kind
            vars(self).pop("_graftc_make", None)
        return getattr(self, name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Create the contents first, so that copies and pickles contain an ordinary cache."""
        getattr(self, next(iter(_attributes(type(self).__mro__[2]))))
        return self.__reduce_ex__(protocol)


@cache
def _attributes(kind: type) -> frozenset[str]:
    return frozenset(vars(new_cache(kind is not _dynamic())))


@cache
def _dynamic() -> type:
    return type(new_cache(False))


@cache
def _deferred(kind: Any) -> Any:
    return type(kind.__name__, (_Deferred, kind), {"__module__": kind.__module__})


def deferred_cache(pairs: bool, make: Callable[[], Any]) -> Any:
    """Return a cache whose contents are created when it is first used.

    Args:
        pairs: whether the model has an encoder.
        make: a function that returns a cache with contents. If it raises, the error is raised at every use.
    """
    ordinary: Any = type(new_cache(pairs))
    kind = _deferred(ordinary)
    deferred = kind.__new__(kind)
    vars(deferred)["_graftc_make"] = make
    return deferred


def cache_field(outputs: Any) -> str | None:
    """Return the name of the cache field that a call's outputs have left unset; None if there is no such field."""
    fields = getattr(type(outputs), "__dataclass_fields__", ())
    return next((name for name in CACHES if name in fields and name not in outputs), None)


def not_at_once(message: str) -> GraftError:
    """Return the error for a cache that cannot be created after the call."""
    return GraftError("GC140", message, hint=_HINT)


def may_return_cache(
    interface: Interface, config: Any, named: Mapping[str, Any], present: Mapping[str, Any], training: bool
) -> bool:
    """Return whether the source model may return a cache for a call that does not mention one.

    Args:
        interface: the model's interface.
        config: the model's config; None if it has none.
        named: the arguments as the caller passed them.
        present: the arguments that affect the call.
        training: whether the model is in train mode.
    """
    if interface.cache is None or training:
        return False
    if named.get(USE_CACHE) is not None or USE_CACHE in present or "labels" in present or ENCODER in present:
        return False
    wanted = getattr(config, USE_CACHE, None)
    if wanted is None and hasattr(config, "get_text_config"):
        wanted = getattr(config.get_text_config(decoder=True), USE_CACHE, None)
    return bool(wanted)
