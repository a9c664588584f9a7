"""Run a model to record how its elements are called, and what else the model's own Python code does to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftc.compat.tensors import version_of
from graftc.compiler.capture.as_captured import as_before
from graftc.compiler.capture.assignments import Attributes, is_the_users
from graftc.compiler.capture.parameter_uses import ParameterUses, observed
from graftc.compiler.live.elements import Recorded, hooked, without_autocast
from graftc.compiler.live.own_state import with_own_buffers
from graftc.passes.core.elements.calls import CallStructure, innermost
from graftc.specs.errors.diagnostics import GraftError


@dataclass(frozen=True)
class RecordedRun:
    """The calls and accesses recorded in a run of a model.

    Attributes:
        calls: the first call to each element.
        written: names of the buffers that the model wrote to, in order.
        read: names of the parameters that the model's own Python code read between elements.
        entered: elements that the model's own Python code does not merely call, each with a description of what
            it does: call a module inside the element, or set an attribute.
        untaken: elements that are called with arguments that no graph accepts, each with the reason.
    """

    calls: Recorded
    written: tuple[str, ...]
    read: tuple[str, ...]
    entered: Mapping[str, str]
    untaken: Mapping[str, str]


def record(model: nn.Module, parts: Sequence[str], maps: Sequence[str], run: Callable[[nn.Module], Any]) -> RecordedRun:
    """Run a copy of a model, and record the inputs of its elements and what else happens to them.

    Args:
        model: the model, which is run without gradients, first in its current mode and then in the other mode; calls in
            the other mode are not recorded.
        parts: paths of layers, or of parts of layers; none of them is inside another.
        maps: paths of maps, inside and outside these parts.
        run: a function that runs the copy, for example with one call.

    Raises:
        GraftError: GC030 if the model does not run in its current mode, or writes to a parameter.
    """
    own = with_own_buffers(model)
    before = {name: (buffer, version_of(buffer)) for name, buffer in own.named_buffers()}
    watch = _Watch(own, parts, maps)
    uses = ParameterUses(own, lambda: not watch.active)
    watched = hooked(own, watch.paths, watch.before, watch.after, always_after=True)
    with torch.no_grad(), torch.random.fork_rng(devices=()), observed(uses), watched:
        with as_before(own):
            try:
                run(own)
            except GraftError:
                raise
            except Exception as error:
                message = f"{type(model).__name__} does not run on the given inputs: {error}"
                raise GraftError("GC030", message) from error
            watch.look_at_all()
        calls = dict(watch.calls)
        with as_before(own):
            own.train(not own.training)
            watch.begin()
            try:
                run(own)
            except GraftError:
                raise
            except Exception:
                pass  # it needs other inputs in this mode
    written = tuple(name for name, (buffer, count) in before.items() if version_of(buffer) != count)
    return RecordedRun(calls, written, tuple(uses.read), watch.entered, watch.untaken)


class _State:
    """The attributes and modes of the modules in an element, as last recorded."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self.update()

    def update(self) -> None:
        """Record the present state."""
        self._recorded = [(name, module, Attributes(module), module.training) for name, module in self.modules.items()]

    def changed(self) -> str:
        """Return the first attribute or mode that has changed since the state was recorded; empty if none has."""
        for name, module, attributes, mode in self._recorded:
            changed = attributes.changed() or (["training"] if module.training != mode else [])
            if changed:
                return f"{name}.{changed[0]}".lstrip(".")
        return ""

    def assigned(self) -> str:
        """Return an attribute that a module of a user-defined class has assigned; empty if there is none.

        Attributes that library layers store between calls, such as tables that grow with a text, are ignored.
        """
        for name, module, attributes, _ in self._recorded:
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
        known = frozenset(parts)
        outer = [*parts, *(path for path in maps if not innermost(path, known))]
        self._states = {path: _State(dict(model.get_submodule(path).named_modules())) for path in outer}
        self._inside = {
            f"{path}.{name}".rstrip("."): path for path, state in self._states.items() for name in state.modules
        }
        self._recorded = frozenset([*parts, *maps])

    @property
    def paths(self) -> Iterable[str]:
        """The paths of all modules in elements."""
        return self._inside

    def begin(self) -> None:
        """Forget which elements are running, and record the state of all elements."""
        self.active.clear()
        for state in self._states.values():
            state.update()

    def look_at_all(self) -> None:
        """Check for changes that were made to elements after their last calls."""
        for path in self._states:
            self._look(path)

    def _look(self, path: str) -> None:
        changed = self._states[path].changed()
        if changed:
            self.entered.setdefault(path, f"the model's own Python sets its {changed}")

    def before(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the first call to a layer, part or map, and what the model's own Python code did to its element."""
        element = self._inside[path]
        if not self.active:
            if path == element:
                self._look(path)
            else:
                self.entered.setdefault(element, f"the model's own Python calls {path} by itself")
        self.active.append(path)
        if path in self._recorded and path not in self.calls:
            try:
                structure, tensors = CallStructure.of(path, module, args, kwargs)
            except GraftError as error:  # the element remains part of the model's own Python code
                self.untaken.setdefault(path, error.message)
                return
            self.calls[path] = structure, without_autocast(tensors, module)

    def after(self, path: str, *_: Any) -> None:
        """Record what an element's call has assigned, once no element is running."""
        while self.active and self.active.pop() != path:
            continue
        if not self.active:
            state, element = self._states[self._inside[path]], self._inside[path]
            if path == element and (changed := state.assigned()):
                self.entered.setdefault(element, f"its Python assigns {changed}")
            state.update()
