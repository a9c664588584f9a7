"""The cache of a call that asked for none: made when somebody looks into it.

Where a source model's config has ``use_cache``, its calls return a cache. Most callers leave it, and a graph that
returns keys and values is one more to capture, so that a call here runs the graph without. What it returns as its
cache is a cache of transformers without contents, which it gets, by another pass over the same inputs, when it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graftc.compiler.capture.interface import Interface
from graftc.compiler.capture.past import CACHES, ENCODER, USE_CACHE, new_cache
from graftc.specs.errors.diagnostics import GraftError

if TYPE_CHECKING:
    pass

_HINT = "call with use_cache=True, which makes the cache at once"


@dataclass(frozen=True)
class CallState:
    """What a second pass has to find as the first one did.

    Attributes:
        inputs: tensors of the call, by name.
        versions: of these, and what tells whether adapter tensors have been written to.
        now: gives `versions` as they are now.
        grad: whether gradients were recorded.
        inference: whether inference mode was on.
        autocast: the element type of autocast; None where it was off.
        device: kind of the device that autocast was for.
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
        """The state of a call.

        Args:
            inputs: of the call, by name. What cannot tell whether it is written to is copied.
            tensors: tells whether adapter tensors have been written to.
            device: where the model is.
        """
        held = {n: v.clone() if isinstance(v, Tensor) and v.is_inference() else v for n, v in inputs.items()}
        watched = [v for v in held.values() if isinstance(v, Tensor) and not v.is_inference()]

        def now() -> tuple[Any, ...]:
            return (*(tensor._version for tensor in watched), *tensors())

        on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        autocast = torch.get_autocast_dtype(device) if on else None
        return cls(held, now(), now, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, device)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, torch is in the state of that call.

        Raises:
            GraftError: GC140 where inputs or adapter tensors have been written to since, or hooks have changed.
        """
        if self.now() != self.versions:
            message = "the cache of a call is made when it is first used, and what the call read has been written to"
            message += ", or its hooks have changed"
            raise GraftError("GC140", message, hint=_HINT)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            if self.autocast is not None:
                stack.enter_context(torch.autocast(self.device, self.autocast))
            elif torch.amp.is_autocast_available(self.device):
                stack.enter_context(torch.autocast(self.device, enabled=False))
            yield


class _Deferred:
    """A cache whose contents are made when one of its attributes is first read; then it is an ordinary one."""

    def __getattr__(self, name: str) -> Any:
        kind = type(self).__mro__[2]
        if name not in _attributes(kind):
            raise AttributeError(f"{kind.__name__!r} object has no attribute {name!r}", name=name, obj=self)
        make = vars(self).get("_graftc_make")
        if make is not None:  # else another thread has made it
            made = make()
            vars(self).update({**vars(made), **vars(self)})
            self.__class__ = kind
            vars(self).pop("_graftc_make", None)
        return getattr(self, name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and files have an ordinary cache."""
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
    """A cache that is made when it is used.

    Args:
        pairs: whether the model has an encoder.
        make: gives the cache; what it raises is raised at that time, and again at the next.
    """
    own: Any = type(new_cache(pairs))
    kind = _deferred(own)
    made = kind.__new__(kind)
    vars(made)["_graftc_make"] = make
    return made


def cache_field(outputs: Any) -> str | None:
    """The field of a call's outputs that is for a cache and has none; None where there is no such field."""
    fields = getattr(type(outputs), "__dataclass_fields__", ())
    return next((name for name in CACHES if name in fields and name not in outputs), None)


def not_at_once(message: str) -> GraftError:
    """The error for a cache that cannot be made when it is used."""
    return GraftError("GC140", message, hint=_HINT)


def may_return_cache(
    interface: Interface, config: Any, named: Mapping[str, Any], present: Mapping[str, Any], training: bool
) -> bool:
    """Whether the source model may return a cache for a call that says nothing of one.

    Args:
        interface: of the model.
        config: its own; None where it has none.
        named: the arguments as given.
        present: what of them makes a difference.
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
