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

from graftc.compiler.cached import cannot_be_cached
from graftc.compiler.capture.interface import Interface
from graftc.compiler.capture.isolation import exclusive, is_traced
from graftc.compiler.capture.past import CACHES, ENCODER, USE_CACHE, new_cache
from graftc.compiler.compilation import Compilation
from graftc.passes.core.ir.program_key import Entry
from graftc.passes.core.weights.sharding import is_unit
from graftc.passes.core.weights.store import Store
from graftc.runtime.hooks.layer_calls import Hearing, hooks_everywhere
from graftc.runtime.model.choosing import with_choices
from graftc.specs.errors.diagnostics import GraftError

if TYPE_CHECKING:
    from graftc.runtime.model.blocks import Root

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


class DefaultCache:
    """The part of a Runner that returns a cache where the source model does without being asked: in eval mode, for
    calls without labels, where its config has ``use_cache``."""

    config: Any
    training: bool
    module: Root
    _kind: str
    _active: Compilation
    _compilation: Compilation
    _interface: Interface
    _store: Store
    _hooked: str | None
    read_past: Callable[[dict[str, Any]], None]
    tokens_of: Callable[[Mapping[str, Any]], Tensor | None]
    run_part: Callable[..., Any]
    hearing: Hearing

    def run_read(
        self, named: Mapping[str, Any], present: dict[str, Any], chosen: Mapping[str, Any], plain: bool, entry: Entry
    ) -> Any:
        """The outputs of a call.

        Args:
            named: the arguments as given.
            present: what of them makes a difference.
            chosen: what chooses among adaptations, as it was given.
            plain: whether they are wanted as a tuple.
            entry: of the graph.
        """
        usual = entry == "forward" and self.may_return_cache(named, present)
        if usual and self.layers_are_heard() and self.can_return_cache() and self.tokens_of(present) is not None:
            present[USE_CACHE], usual = True, False
        if usual:
            return self.with_cache_to_come(present, chosen, plain)
        return self.run_chosen(present, chosen, plain, entry)

    def run_chosen(
        self, present: dict[str, Any], chosen: Mapping[str, Any], plain: bool, entry: Entry = "forward"
    ) -> Any:
        """The outputs for what is present in a call, and what chooses among adaptations as it was given."""
        if USE_CACHE in present:
            self.read_past(present)
        if self._active.controls:
            present = with_choices(self._active, present, chosen)
        return self.run_part(present, plain, entry)

    def may_return_cache(self, named: Mapping[str, Any], present: Mapping[str, Any]) -> bool:
        """Whether the source model may return a cache for a call that says nothing of one.

        Args:
            named: the arguments as given.
            present: what of them makes a difference.
        """
        if self._interface.cache is None or self.training or is_traced():
            return False
        if named.get(USE_CACHE) is not None or USE_CACHE in present or "labels" in present or ENCODER in present:
            return False
        wanted = getattr(self.config, USE_CACHE, None)
        if wanted is None and hasattr(self.config, "get_text_config"):
            wanted = getattr(self.config.get_text_config(decoder=True), USE_CACHE, None)
        return bool(wanted)

    def can_return_cache(self) -> bool:
        """Whether the model keeps a cache of keys and values, and no adaptation rules one out."""
        return self._keeps_cache() and not cannot_be_cached(self._active)

    def layers_are_heard(self) -> bool:
        """Whether hooks may change, or count, what layers give."""
        return self.hearing.hooked or hooks_everywhere()

    def with_cache_to_come(self, present: dict[str, Any], chosen: Mapping[str, Any], plain: bool) -> Any:
        """The outputs of a call, whose cache is made when it is used."""
        call = CallState.of({**present, **chosen}, self._written, self._kind)
        outputs = self.run_chosen(dict(present), chosen, False)
        field = cache_field(outputs)
        if field is not None and self._keeps_cache():
            again: Any = object.__new__(type(self))  # as it is now, whatever calls leave out by then
            vars(again).update(vars(self))
            inputs = {name: call.inputs[name] for name in present}
            choice = {name: call.inputs[name] for name in chosen}

            def make() -> Any:
                if is_unit(self.module):
                    raise GraftError("GC140", "of a sharded model all processes make a cache together", hint=_HINT)
                if again.training:
                    message = "the cache of a call is made when it is first used, and the model is in train mode by now"
                    raise GraftError("GC140", message, hint=_HINT)
                with call.again():
                    return again.run_chosen({**inputs, USE_CACHE: True}, choice, False)[field]

            made = deferred_cache(self._active.cache_layout.pairs, make)
            outputs = type(outputs)(**{**outputs, field: made})
        return outputs.to_tuple() if plain and hasattr(outputs, "to_tuple") else outputs

    def _keeps_cache(self) -> bool:
        if (known := self._active.known_to_keep_cache) is None:
            with exclusive():
                known = self._active.keeps_cache
        return known

    def _written(self) -> tuple[Any, ...]:
        """A value that differs once the adaptations, their tensors, or the hooks on the table of embeddings have
        changed."""
        key = id(self._compilation), self._kind
        known = vars(self).get("_adapter_tensors")
        if known is None or known[0] != key:
            known = vars(self)["_adapter_tensors"] = key, [tensor for _, tensor in self._store.adapters()]
        table = self.module.get_submodule(self._hooked) if self._hooked is not None else None
        hooks = () if table is None else (*table._forward_pre_hooks, *table._forward_hooks)
        return (*key, hooks, sum(tensor._version for tensor in known[1] if not tensor.is_inference()))
