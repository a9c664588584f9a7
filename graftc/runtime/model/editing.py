"""Adaptations of a live model: left out for a while, added, removed and renamed, while the others go on training.

A *view* is a Compilation of another spec over the same tensors, with its code. Leaving an adaptation out shows a view;
adding, removing and renaming make one the model's own. Tensors that stay are the same objects all along, which
optimisers know them by, and whatever fails does so before anything has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from graftc.compiler.capture.isolation import exclusive, is_traced
from graftc.compiler.compilation import Compilation
from graftc.compiler.inspect.snapshot import adapter_values
from graftc.compiler.pipeline import recompile
from graftc.compiler.resolve.train import TRAIN
from graftc.compiler.steering import Steerings, steerings
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.program_key import ProgramKey
from graftc.passes.core.weights.names import owner_of, renamed
from graftc.passes.core.weights.store import Store
from graftc.runtime.model.blocks import Root, Runner
from graftc.specs.arguments import as_names
from graftc.specs.base import MethodSpec
from graftc.specs.changes import adding, leaving, renaming
from graftc.specs.errors.diagnostics import GraftError, unknown_name

if TYPE_CHECKING:
    from graftc.runtime.compiled import Compiled

_SHOWN = ("_active", "_roots", "_programs", "_outputs", "_label", "_showing", "_steering")
"""Attributes of a Runner that a view has its own of."""

View = Mapping[str, Any]
"""Their values."""


class Editing:
    """The part of `Compiled` that changes which adaptations there are."""

    module: Root
    _compilation: Compilation
    _active: Compilation
    _showing: frozenset[str]
    _label: str
    _store: Store
    _steering: Steerings
    _trained: set[str]
    _watch: Callable[..., None]
    install: Callable[[ProgramKey, Program], None]
    device: Any
    sibling: Callable[..., Compiled]

    _off: frozenset[str] = frozenset()

    @cached_property
    def _views(self) -> dict[frozenset[str], View]:
        """Views by the adaptations that they are without."""
        return {}

    _made_views = 0

    @contextmanager
    def without(self, names: tuple[str, ...]) -> Iterator[None]:
        """Inside, the model computes what it computes without some adaptations.

        Raises:
            GraftError: GC091 where there is no such adaptation, GC036 for a part of a composition.
        """
        before = self._shown()
        self._show(self._showing | self._adaptations(names))
        try:
            yield
        finally:
            vars(self).update(before)

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
        self._show(off)
        self._off = off

    def enable(self, *names: str) -> None:
        """Undo `disable` for some adaptations, or for all where none is named.

        Raises:
            GraftError: GC091 where there is no such adaptation.
        """
        off = self._off - self._adaptations(names) if names else frozenset()
        self._show(off)
        self._off = off

    @exclusive()
    def add(
        self, adaptation: MethodSpec | Mapping[str, Any], values: Mapping[str, Tensor] | None = None
    ) -> dict[str, nn.Parameter]:
        """Add an adaptation, on top of those that there are. It has an effect from the next call on.

        Args:
            adaptation: an entry as in a spec's ``adapt`` list.
            values: tensors to start from, by the names that they have in this model.

        Returns:
            What trains of it, by name, for ``optimizer.add_param_group``;
            ``graftc.optim.param_groups(compiled, lr, only=[name])`` gives them in groups.

        Raises:
            GraftError: as `graftc.compile`; GC005 for a name that is taken, GC053 for values that do not fit, GC072
                where the model's tensors are sharded. Nothing has changed then.
        """
        self._require_whole()
        spec = adding(self._compilation.spec, adaptation)
        name = str(spec.adapt[-1].name)
        given = dict(values or {})
        other = sorted(fqn for fqn in given if owner_of(fqn) != name)
        if other:
            raise GraftError("GC053", f"{other[0]} is no tensor of {name!r}", hint="give the tensors of what is added")
        made = recompile(self._compilation, spec, {**dict(adapter_values(self._store)), **given})
        unknown = sorted(given.keys() - {fqn for fqn, _ in made.store.adapters()})
        if unknown:
            raise GraftError("GC053", f"{name!r} has no tensor {unknown[0]}")
        self._take(made, {})
        added = ((fqn, t) for fqn, t in self._store.adapters() if owner_of(fqn) == name)
        return {fqn: t for fqn, t in added if isinstance(t, nn.Parameter) and t.requires_grad}

    @exclusive()
    def remove(self, name: str) -> None:
        """Remove an adaptation with its tensors.

        An optimiser still holds these, without gradients, and no step moves them; make another one to free the memory.

        Args:
            name: of an adaptation.

        Raises:
            GraftError: GC091 where there is no such adaptation, GC036 where it is a part of a composition, GC072 where
                the model's tensors are sharded. Nothing has changed then.
        """
        self._require_whole()
        spec = self._compilation.spec
        known = [str(a.name) for a in spec.adapt]
        if name not in known:
            raise unknown_name("adaptation", name, known)
        if spec.composition_of(name) is not None:
            hint = "an adaptation of a composition goes with it; compile a spec without them"
            raise GraftError("GC036", f"{name!r} is part of a composition", hint=hint)
        kept = {fqn: t for fqn, t in adapter_values(self._store) if owner_of(fqn) != name}
        self._take(recompile(self._compilation, leaving(spec, {name}), kept), {})

    @exclusive()
    def rename(self, old: str, new: str) -> None:
        """Give an adaptation another name, and its tensors with it; they stay the same objects.

        Args:
            old: its name.
            new: its new one.

        Raises:
            GraftError: GC091 where there is no such adaptation, GC005 for a name that is taken, GC002 for what is no
                name, GC072 where the model's tensors are sharded. Nothing has changed then.
        """
        self._require_whole()
        spec = self._compilation.spec
        known = [str(a.name) for a in spec.adapt]
        if old not in known:
            raise unknown_name("adaptation", old, known)
        if old == new:
            return
        values = {_as(fqn, {old: new}): tensor for fqn, tensor in adapter_values(self._store)}
        self._take(recompile(self._compilation, renaming(spec, old, new), values), {old: new})

    def alone(self, names: tuple[str, ...]) -> Compiled:
        """A compiled model of its own with these adaptations only, and with the ``train:`` list and added tokens; it
        shares no adapter tensor with this one.

        Raises:
            GraftError: GC091 where there is no such adaptation, GC036 for a part of a composition.
        """
        spec = self._compilation.spec
        kept = self._adaptations(names)
        gone = {str(a.name) for a in spec.adapt} - kept
        composed = {str(c.name) for c in spec.compose if not set(c.members) & kept}
        left = leaving(spec, gone)
        values = {n: t for n, t in adapter_values(self._store) if owner_of(n) not in gone | composed}
        return self.sibling(left, values)

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

    def compilations(self) -> list[Compilation]:
        """See `ModelRunner`: those of views too."""
        shown = [view["_active"] for view in self._views.values()]
        return list({id(c): c for c in (self._compilation, self._active, *shown)}.values())

    def shared(self) -> list[Any]:
        """See `ModelRunner`."""
        programs = (program for view in self._views.values() for program in view["_programs"].values())
        return [*super().shared(), *programs]  # type: ignore[misc]

    def relower(self) -> None:
        """See `Runner`: the code of views too."""
        before = self._shown()
        for view in [view for off, view in self._views.items() if off != self._showing]:
            vars(self).update(view)
            super().relower()  # type: ignore[misc]
        vars(self).update(before)
        super().relower()  # type: ignore[misc]

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

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, nothing is left out."""
        before = self._shown()
        self._show(frozenset())
        try:
            yield
        finally:
            vars(self).update(before)

    def _view(self, off: frozenset[str]) -> View:
        """A view without some adaptations; what is shown stays."""
        spec = leaving(self._compilation.spec, off, train=TRAIN not in off)
        own = dict(adapter_values(self._store))
        made = recompile(self._compilation, spec, own)
        steering = self._everything()
        left = {str(a.name) for a in spec.adapt} | {str(c.name) for c in spec.compose}
        kept = Steerings(*({n: v for n, v in table.items() if n in left} for table in _tables(steering)))
        before, tables = self._shown(), _Tables(self._store)
        try:
            for fqn, tensor in made.store.adapters():
                if fqn not in self._store:  # constants, of what is now directly on a weight of the base
                    tables.put(fqn, self._here(tensor), persistent=False)
            _put_over(made, self._compilation)
            self._install(made, kept, off)
            return self._shown()
        except BaseException:
            tables.undo()
            raise
        finally:
            vars(self).update(before)

    def _here(self, tensor: Tensor) -> Tensor:
        """A new tensor where the model is."""
        moved = tensor.detach().to(self.device)
        return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved

    def _everything(self) -> Steerings:
        """What steers when nothing is left out."""
        whole = self._views.get(frozenset())
        return self._steering if whole is None else cast(Steerings, whole["_steering"])

    def _install(self, made: Compilation, steering: Steerings, off: frozenset[str]) -> None:
        """Code of its own for a Compilation over the same tensors."""
        self._made_views += 1
        fresh = {"_active": made, "_roots": {}, "_programs": {}, "_outputs": {}, "_steering": steering}
        vars(self).update({**fresh, "_label": f"{self._made_views}: ", "_showing": off})
        for key in (made.key("train"), made.key("eval")):
            self.install(key, made.programs[key])

    def _take(self, made: Compilation, names: Mapping[str, str]) -> None:
        """Make a Compilation the model's own: tensors that it has under other names move there, new ones come in, and
        those that it has not go."""
        store, whole, before = self._store, self._everything(), self._shown()
        fresh = made.store
        wanted = dict(fresh.adapters())
        held = {_as(fqn, names): (fqn, tensor) for fqn, tensor in store.adapters()}
        tables = _Tables(store)
        compilation, settled = self._compilation, set(store.settled)
        try:
            for fqn, tensor in wanted.items():
                if fqn in held and held[fqn][0] != fqn:
                    tables.put(fqn, held[fqn][1], persistent=_persists(fresh, fqn))
                elif fqn not in held:
                    tables.put(fqn, self._here(tensor), persistent=_persists(fresh, fqn))
            _put_over(made, compilation)
            self._compilation = made
            steering = _joined(whole, steerings(made), names)
            self._install(made, steering, frozenset())
        except BaseException:
            tables.undo()
            self._compilation, store.settled = compilation, settled
            vars(self).update(before)
            raise
        updated = set(store.updated.values())
        for fqn, (old, tensor) in held.items():
            if old not in wanted and old not in updated:
                tables.drop(old)
            if fqn not in wanted:
                tensor.grad = None
        store.settled = {_as(fqn, names) for fqn in settled} & wanted.keys() | fresh.settled
        self._forget(names)
        watched = {*made_names(steering)} - {names.get(n, n) for n in made_names(whole)}
        self._watch(watched)

    def _forget(self, names: Mapping[str, str]) -> None:
        """What was made of the Compilation before, and what it called adaptations."""
        self._views.clear()
        self._prune()
        for cached in ("report", "_frozen", "_trainable"):
            vars(self).pop(cached, None)
        for old, new in names.items():
            if old in self._trained:
                self._trained.add(new)
        off = {names.get(name, name) for name in self._off}
        self._off = frozenset(off & {*(str(a.name) for a in self._compilation.spec.adapt), TRAIN})
        self._show(self._off)

    def _prune(self) -> None:
        """Let the code go that nothing shows any more."""
        for block in cast(Runner, self).blocks.values():
            held = block._graftc.functions
            block._graftc.functions = {key: code for key, code in held.items() if key.startswith(self._label)}

    def _require_whole(self) -> None:
        """Refuse where tensors are sharded: engines have noted which parameters there are."""
        if any(hasattr(tensor, "device_mesh") for _, tensor in self._store.tensors()):
            hint = "add, remove and rename before fully_shard; disable() and disabled() work afterwards too"
            raise GraftError("GC072", "the model's tensors are sharded over processes", hint=hint)


def made_names(steering: Steerings) -> list[str]:
    """Adaptations that have something to be missed."""
    return [*steering.controllers, *steering.objectives]


def _tables(steering: Steerings) -> tuple[Mapping[str, Any], ...]:
    return steering.controllers, steering.objectives, steering.outputs


def _joined(old: Steerings, new: Steerings, names: Mapping[str, str]) -> Steerings:
    """What steers anew, with what steered adaptations that stay: it knows how far it is."""
    before = {new: old for old, new in names.items()}
    for name, controller in new.controllers.items():
        known = old.controllers.get(before.get(name, ""))
        if known is not None:
            controller.total, controller.optimiser = known.total, known.optimiser
    found = ({n: own.get(n, v) for n, v in each.items()} for own, each in zip(_tables(old), _tables(new), strict=True))
    return Steerings(*found)


def _put_over(made: Compilation, known: Compilation) -> None:
    """Let a Compilation that was made of the same source run over the tensors of another one."""
    made.store, made.model, made.held = known.store, known.model, known.held


def _as(fqn: str, names: Mapping[str, str]) -> str:
    """A tensor's name where adaptations have other names."""
    owner = owner_of(fqn)
    return renamed(fqn, names[owner]) if owner in names else fqn


def _persists(store: Store, fqn: str) -> bool:
    path, _, last = fqn.rpartition(".")
    return last not in store.owner(path)._non_persistent_buffers_set


class _Tables:
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
