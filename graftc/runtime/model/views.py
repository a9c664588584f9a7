"""Views of a live model: what it computes without some of its adaptations, over the same tensors.

A *view* is a Compilation of another spec over the model's own Store, with its code. Showing one exchanges the Runner's
tables; calls then run it, and cost nothing more.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from torch import Tensor, nn

from graftc.compiler.capture.isolation import exclusive, is_traced
from graftc.compiler.compilation import Compilation
from graftc.compiler.inspect.snapshot import adapter_values
from graftc.compiler.pipeline import recompile
from graftc.compiler.resolve.train import TRAIN
from graftc.compiler.steering import Steerings
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.program_key import ProgramKey
from graftc.passes.core.weights.store import Store
from graftc.specs.changes import leaving
from graftc.specs.errors.arguments import as_names
from graftc.specs.errors.diagnostics import GraftError, unknown_name

_TABLES = ("_roots", "_programs", "_lowered", "_outcomes", "_outputs", "_tables")
_SHOWN = (*_TABLES, "_active", "_label", "_showing", "_steering")
"""Attributes of a Runner that a view has its own of."""

View = Mapping[str, Any]
"""Their values."""

P = ParamSpec("P")
R = TypeVar("R")


def with_every_adaptation(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """A method of a Runner that has every adaptation, whatever `disable` and `disabled` leave out of calls meanwhile.

    Whatever writes a file or makes another model is such a method. Calls in other threads go on as they were.
    """

    @functools.wraps(method)
    def called(self: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        return method(self.complete(), *args, **kwargs)

    return called  # type: ignore[return-value]


class Viewed:
    """The part of `Compiled` that leaves adaptations out."""

    _compilation: Compilation
    _active: Compilation
    _showing: frozenset[str]
    _label: str
    _store: Store
    _steering: Steerings
    install: Callable[[ProgramKey, Program], None]
    _as_run: Callable[[ProgramKey], Program]
    device: Any

    _off: frozenset[str] = frozenset()
    _base_only: bool
    _made_views = 0

    @cached_property
    def _left_out(self) -> list[frozenset[str]]:
        """What each context that is open leaves out, the outermost first."""
        return []

    @property
    def _hidden(self) -> frozenset[str]:
        """What calls leave out now."""
        return self._off.union(*self._left_out)

    @cached_property
    def _views(self) -> dict[frozenset[str], View]:
        """Views by the adaptations that they are without."""
        return {}

    @contextmanager
    def without(self, names: tuple[str, ...]) -> Iterator[None]:
        """Inside, the model computes what it computes without some adaptations.

        Raises:
            GraftError: GC091 where there is no such adaptation, GC036 for a part of a composition.
        """
        off = self._adaptations(names)
        self._show(self._hidden | off)
        depth = len(self._left_out)
        self._left_out.append(off)
        try:
            yield
        finally:  # adaptations may have come, gone and changed their names meanwhile
            del self._left_out[depth:]
            self._show(self._hidden)

    def beside(self, names: tuple[str, ...]) -> Any:
        """A Runner of the same module that computes without some adaptations, whatever calls of the module leave out.

        Raises:
            GraftError: as `without`.
        """
        off = self._hidden | self._adaptations(names)
        if off not in self._views:
            with exclusive():
                self._views.setdefault(self._showing, self._shown())
                self._views[off] = self._view(off)
        made = copy.copy(self)
        vars(made).pop("_stand_in", None)
        vars(made).update(self._views[off])
        return made

    @cached_property
    def tried_caches(self) -> dict[tuple[str, ...], bool]:
        """Whether a cache that begins with some adaptations gives what they do in the graph."""
        return {}

    def disable(self, *names: str) -> None:
        """Leave adaptations out of all calls from now on, until `enable`. Their tensors stay: `save` and `merge` have
        them, and they are not trained, since no loss depends on them. ``compiled.disabled(name)`` does it for a while.

        The first time it takes as long as compiling without a capture; after that it costs next to nothing.

        Args:
            names: adaptations or compositions; ``trained`` is the ``train:`` list.

        Raises:
            GraftError: GC091 where there is no such adaptation, GC036 for a part of a composition; nothing has changed
                then.
        """
        off = self._off | self._adaptations(names)
        self._show(self._hidden | off)
        self._off = off

    def enable(self, *names: str) -> None:
        """Undo `disable` for some adaptations, or for all where none is named.

        Raises:
            GraftError: GC091 where there is no such adaptation.
        """
        off = self._off - self._adaptations(names) if names else frozenset()
        self._show(off.union(*self._left_out))
        self._off = off

    def complete(self) -> Any:
        """See `ModelRunner`. A Runner of the same module, where this one leaves something out or runs the base."""
        if not (self._showing or self._base_only):
            return self
        made = copy.copy(self)
        vars(made).pop("_stand_in", None)
        own = {"_off": frozenset(), "_left_out": [], "_base_only": False, "_as_reference": False}
        vars(made).update({**self._views.get(frozenset(), {}), **own})
        return made

    def compilations(self) -> list[Compilation]:
        """See `ModelRunner`: those of views too."""
        shown = [view["_active"] for view in self._views.values()]
        return list({id(c): c for c in (self._compilation, self._active, *shown)}.values())

    def shared(self) -> list[Any]:
        """See `ModelRunner`."""
        tables = (view[name] for view in self._views.values() for name in ("_programs", "_lowered"))
        programs = (program for table in tables for program in table.values())
        return [*super().shared(), *programs]  # type: ignore[misc]

    def relower(self) -> None:
        """See `Runner`: the code of views too."""
        before = self._shown()
        for view in [view for off, view in self._views.items() if off != self._showing]:
            vars(self).update(view)
            super().relower()  # type: ignore[misc]
        vars(self).update(before)
        super().relower()  # type: ignore[misc]

    def _adaptations(self, names: tuple[str, ...]) -> frozenset[str]:
        """Adaptations by their names, or by those of their compositions."""
        spec = self._compilation.spec
        names = as_names(names) if names else ()
        found: set[str] = set()
        known = [*spec.owners, *([TRAIN] if spec.train else [])]
        for name in names:
            composed = next((c.members for c in spec.compose if c.name == name), None)
            if composed is None and name not in known:
                raise unknown_name("adaptation", name, known)
            found |= self._adaptations(tuple(composed)) if composed is not None else {name}
        return frozenset(found)

    def _shown(self) -> dict[str, Any]:
        self._steering  # noqa: B018 - it is made when it is first asked for
        return {name: vars(self)[name] for name in _SHOWN}

    def _show(self, off: frozenset[str]) -> None:
        """Show what the model computes without some adaptations."""
        if off == self._showing:
            return
        if off not in self._views:
            if is_traced():
                raise GraftError("GC031", "this has no graph yet; call the model so once before compiling it")
            self._views[self._showing] = self._shown()
            with exclusive():
                self._views[off] = self._view(off)
        vars(self).update(self._views[off])

    def _view(self, off: frozenset[str]) -> View:
        """A view without some adaptations; what is shown stays."""
        spec = leaving(self._compilation.spec, off, train=TRAIN not in off)
        own = dict(adapter_values(self._store))
        made = recompile(self._compilation, spec, own)
        steering = self._everything()
        left = {str(a.name) for a in spec.adapt} | {str(c.name) for c in spec.compose}
        kept = Steerings(*({n: v for n, v in table.items() if n in left} for table in tables_of(steering)))
        tables = Tables(self._store)
        beside = copy.copy(self)  # other threads may run this one meanwhile
        try:
            for fqn, tensor in made.store.adapters():
                if fqn not in self._store:  # constants, of what is now directly on a weight of the base
                    tables.put(fqn, self._here(tensor), persistent=False)
            beside._install(over(made, self._compilation), kept, off)
            return beside._shown()
        except BaseException:
            tables.undo()
            raise
        finally:
            self._made_views = beside._made_views

    def _install(self, made: Compilation, steering: Steerings, off: frozenset[str]) -> None:
        """Code of its own for a Compilation over the same tensors."""
        self._made_views += 1
        fresh: dict[str, Any] = {name: {} for name in _TABLES}
        own = {"_active": made, "_steering": steering, "_label": f"{self._made_views}: ", "_showing": off}
        vars(self).update({**fresh, **own})
        for key in (made.key("train"), made.key("eval")):
            self.install(key, self._as_run(key))

    def _here(self, tensor: Tensor) -> Tensor:
        """A new tensor where the model is."""
        moved = tensor.detach().to(self.device)
        return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved

    def _everything(self) -> Steerings:
        """What steers when nothing is left out."""
        whole = self._views.get(frozenset())
        return self._steering if whole is None else cast(Steerings, whole["_steering"])


def tables_of(steering: Steerings) -> tuple[Mapping[str, Any], ...]:
    return steering.controllers, steering.objectives, steering.outputs


def over(made: Compilation, known: Compilation) -> Compilation:
    """A Compilation that was made of the same source, over the tensors of another one."""
    return replace(made, store=known.store, model=known.model, watch=known.watch)


class Tables:
    """Puts tensors into a Store's tree and takes them out again."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._put: list[str] = []

    def put(self, fqn: str, tensor: Tensor, *, persistent: bool) -> None:
        """Put a tensor in by a new name."""
        self._store.put(fqn, tensor, persistent=persistent)
        self._put.append(fqn)

    def drop(self, fqn: str) -> None:
        """Take a tensor out, and containers that are empty then."""
        self._store.drop(fqn)

    def undo(self) -> None:
        """Take out all that was put in."""
        for fqn in self._put:
            self._store.drop(fqn)
