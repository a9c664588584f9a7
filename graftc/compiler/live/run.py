"""A run of a model that shows how its elements are called, and what else the model's own Python does with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from graftc.compat.tensors import version_of
from graftc.compiler.capture.as_captured import as_before
from graftc.compiler.capture.assignments import Attributes, is_the_users
from graftc.compiler.capture.parameter_uses import ParameterUses, observed
from graftc.compiler.live.elements import Recorded, without_autocast
from graftc.compiler.live.own_state import with_own_buffers
from graftc.passes.core.elements.calls import CallStructure, innermost
from graftc.specs.errors.diagnostics import GraftError


@dataclass(frozen=True)
class RecordedRun:
    """The calls and accesses recorded in a run of a model.

    Attributes:
        calls: the first call of each element.
        written: names of the buffers that the model wrote to, in order.
        read: names of the parameters that the model's own Python read between elements.
        entered: elements that the model's own Python does more with than call them, each with what it does: it calls a
            module inside, or sets an attribute.
        untaken: elements that are called with arguments that no graph accepts, each with what those are.
    """

    calls: Recorded
    written: tuple[str, ...]
    read: tuple[str, ...]
    entered: Mapping[str, str]
    untaken: Mapping[str, str]


def record(model: nn.Module, parts: Sequence[str], maps: Sequence[str], run: Callable[[nn.Module], Any]) -> RecordedRun:
    """Run a copy of a model, and record the inputs that its elements get and what else happens to them.

    Args:
        model: the model, which is run in its current mode, and then in the other one for buffers and parameters alone,
            without gradients.
        parts: paths of layers, or of parts of layers; none of them is inside another.
        maps: paths of maps, inside and outside of these.
        run: what is done with the copy, such as one call.

    Raises:
        GraftError: GC030 if it does not run in its current mode, or writes to a parameter.
    """
    own = with_own_buffers(model)
    before = {name: (buffer, version_of(buffer)) for name, buffer in own.named_buffers()}
    watch = _Watch(own, parts, maps)
    uses = ParameterUses(own, lambda: not watch.active)
    with torch.no_grad(), torch.random.fork_rng(devices=()), observed(uses), watch.hooked():
        with as_before(own):
            try:
                run(own)
            except GraftError:
                raise
            except Exception as error:
                message = f"{type(model).__name__} does not run on the inputs given: {error}"
                raise GraftError("GC030", message) from error
            watch.look_at_all()
        calls = dict(watch.calls)
        with as_before(own):
            own.train(not own.training)
            watch.begin()
            _run_if_it_runs(own, run)
    written = tuple(name for name, (buffer, count) in before.items() if version_of(buffer) != count)
    return RecordedRun(calls, written, tuple(uses.read), watch.entered, watch.untaken)


def _run_if_it_runs(model: nn.Module, run: Callable[[nn.Module], Any]) -> None:
    try:
        run(model)
    except GraftError:
        raise
    except Exception:  # it needs other inputs in this mode
        return


@dataclass
class _State:
    """The attributes and modes of the modules in an element."""

    modules: Mapping[str, nn.Module]
    attributes: list[Attributes] = field(default_factory=list)
    modes: list[bool] = field(default_factory=list)

    def keep(self) -> None:
        self.attributes = [Attributes(module) for module in self.modules.values()]
        self.modes = [module.training for module in self.modules.values()]

    def changed(self) -> str:
        """Return the first attribute or mode that has changed since `keep`; empty if none has."""
        for name, attributes, mode in zip(self.modules, self.attributes, self.modes, strict=True):
            changed = attributes.changed() or (["training"] if self.modules[name].training != mode else [])
            if changed:
                return f"{name}.{changed[0]}".lstrip(".")
        return ""

    def assigned(self) -> str:
        """Return an attribute that the call of a user-defined class has assigned; empty if there is none.

        Attributes that layers of libraries keep from call to call, such as tables that grow with a text, are ignored.
        """
        for (name, module), attributes in zip(self.modules.items(), self.attributes, strict=True):
            if is_the_users(module) and (changed := attributes.changed()):
                return f"{name}.{changed[0]}".lstrip(".")
        return ""


class _Watch:
    """Hooks that track which elements are running.

    Args:
        model: the model that is run.
        parts, maps: as for `record`.
    """

    def __init__(self, model: nn.Module, parts: Sequence[str], maps: Sequence[str]) -> None:
        self.active: list[str] = []
        self.calls: dict[str, tuple[CallStructure, Sequence[Tensor]]] = {}
        self.entered: dict[str, str] = {}
        self.untaken: dict[str, str] = {}
        self._model = model
        known = frozenset(parts)
        outer = [*parts, *(path for path in maps if not innermost(path, known))]
        self._states = {path: _State(dict(model.get_submodule(path).named_modules())) for path in outer}
        self._inside = {
            f"{path}.{name}".rstrip("."): path for path, state in self._states.items() for name in state.modules
        }
        self._paths = frozenset([*parts, *maps])
        self.begin()

    def begin(self) -> None:
        """Clear the running elements, and remember the state of all elements."""
        self.active.clear()
        for state in self._states.values():
            state.keep()

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Record calls while the block runs."""
        handles = []
        for path in self._inside:
            module = self._model.get_submodule(path)
            handles.append(module.register_forward_pre_hook(self._before(path), with_kwargs=True))
            handles.append(module.register_forward_hook(self._after(path), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def look_at_all(self) -> None:
        """Check for changes that were made to elements after their last calls."""
        for path in self._states:
            self._look(path)

    def _look(self, path: str) -> None:
        changed = self._states[path].changed()
        if changed:
            self.entered.setdefault(path, f"the model's own Python sets its {changed}")

    def _before(self, path: str) -> Callable[..., None]:
        element, wanted = self._inside[path], path in self._paths

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self.active:
                if path == element:
                    self._look(path)
                else:
                    self.entered.setdefault(element, f"the model's own Python calls {path} by itself")
            self.active.append(path)
            if wanted and path not in self.calls:
                try:
                    structure, tensors = CallStructure.of(path, module, args, kwargs)
                except GraftError as error:  # it remains part of the model's own Python
                    self.untaken.setdefault(path, error.message)
                    return
                self.calls[path] = structure, without_autocast(tensors, module)

        return note

    def _after(self, path: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            while self.active and self.active.pop() != path:
                continue
            if not self.active:
                state, element = self._states[self._inside[path]], self._inside[path]
                if path == element and (changed := state.assigned()):
                    self.entered.setdefault(element, f"its Python assigns {changed}")
                state.keep()

        return note
