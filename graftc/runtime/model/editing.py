"""Adaptations of a live model: added, removed and renamed, while the others go on training.

A change is compiled in a Store of its own and then put over the live one. Tensors that stay are the same objects all
along, which optimisers know them by, and whatever fails does so before anything has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from graftc.compiler.capture.isolation import exclusive
from graftc.compiler.compilation import Compilation
from graftc.compiler.inspect.snapshot import adapter_values
from graftc.compiler.pipeline import recompile
from graftc.compiler.resolve.train import TRAIN
from graftc.compiler.steering import Steerings, steerings
from graftc.passes.core.ir.eval_mode import dropouts
from graftc.passes.core.weights.names import owner_of, parsed, renamed
from graftc.passes.core.weights.store import Store
from graftc.runtime.above import above
from graftc.runtime.model.blocks import Runner
from graftc.runtime.model.views import Tables, Viewed, over, tables_of
from graftc.specs.base import MethodSpec
from graftc.specs.changes import adding, leaving, renaming
from graftc.specs.errors.diagnostics import GraftError, unknown_name

if TYPE_CHECKING:
    from pathlib import Path

    from graftc.compiler.roles.structure import Structure
    from graftc.runtime.compiled import Compiled


class Editing(Viewed):
    """The part of `Compiled` that changes which adaptations there are."""

    _trained: set[str]
    _watch: Callable[..., None]
    sibling: Callable[..., Compiled]

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
            raise GraftError("GC053", f"{other[0]} is not a tensor of {name!r}", hint="give tensors of what is added")
        made = recompile(self._compilation, spec, {**dict(adapter_values(self._store)), **given})
        unknown = sorted(given.keys() - {fqn for fqn, _ in made.store.adapters()})
        if unknown:
            raise GraftError("GC053", f"{name!r} has no tensor {unknown[0]}")
        self._take(made, {})
        added = ((fqn, t) for fqn, t in self._store.adapters() if owner_of(fqn) == name)
        return {fqn: t for fqn, t in added if isinstance(t, nn.Parameter) and t.requires_grad}

    def load_adapter(self, folder: str | Path, name: str | None = None) -> dict[str, nn.Parameter]:
        """Add the adaptation of a folder that PEFT wrote, on top of those that there are. It has an effect from the
        next call on; ``disable(name)`` switches it off.

        Args:
            folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
            name: what the adaptation is called here; by default as the folder is.

        Returns:
            What trains of it, by name, as `add`.

        Raises:
            GraftError: as `graftc.import_peft` and `add`; GC112 where the adapter also trains modules of the base in
                full, or rows of a table beside its method: import such with the others. Nothing has changed then.
        """
        from graftc.compiler.roles.structure import find_structure

        self._require_whole()
        own, path = next(iter(above("names_of")([folder] if name is None else {name: folder}).items()))
        known = [str(a.name) for a in self._compilation.spec.adapt]
        if own in known:
            raise GraftError("GC005", f"the name {own!r} is taken by another adaptation", hint="give another name")
        base = self._compilation
        capture, flags = base.main.captures[0], base.program("train", "base").flags

        def structure() -> Structure:
            return find_structure(capture.program.graph, capture.constants)

        return self.add(*above("entry_of")(path, own, base.source, base.main.axes, flags, structure))

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
            GraftError: GC091 where there is no such adaptation, GC005 for a name that is taken, GC002 for what is not
                a name, GC072 where the model's tensors are sharded. Nothing has changed then.
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

    def _take(self, made: Compilation, names: Mapping[str, str]) -> None:
        """Make a Compilation the model's own: tensors that it has under other names move there, new ones come in, and
        those that it lacks go."""
        store, whole, before = self._store, self._everything(), self._shown()
        fresh = made.store
        wanted = dict(fresh.adapters())
        held = {_as(fqn, names): (fqn, tensor) for fqn, tensor in store.adapters()}
        tables = Tables(store)
        compilation, settled = self._compilation, set(store.settled)
        try:
            for fqn, tensor in wanted.items():
                if fqn in held and held[fqn][0] != fqn:
                    tables.put(fqn, held[fqn][1], persistent=_persists(fresh, fqn))
                elif fqn not in held:
                    tables.put(fqn, self._here(tensor), persistent=_persists(fresh, fqn))
            made = over(made, compilation)
            self._compilation = made
            steering = _joined(whole, steerings(made), names)
            self._install(made, steering, frozenset())
        except BaseException:
            tables.undo()
            self._compilation, store.settled = compilation, settled
            vars(self).update(before)
            self._tidy()
            raise
        self._take_dropouts(names)
        updated = set(store.updated.values())
        for fqn, (old, tensor) in held.items():
            if old not in wanted and old not in updated:
                tables.drop(old)
            if fqn not in wanted:
                tensor.grad = None
        store.settled = {_as(fqn, names) for fqn in settled} & wanted.keys() | fresh.settled
        self._forget(names)
        self._tidy()
        watched = {*_steered(steering)} - {names.get(n, n) for n in _steered(whole)}
        self._watch(watched)

    def _forget(self, names: Mapping[str, str]) -> None:
        """What was made of the Compilation before, and what it called adaptations."""
        self._views.clear()
        self.tried_caches.clear()
        self._prune()
        for cached in ("report", "_frozen", "_trainable"):
            vars(self).pop(cached, None)
        for old, new in names.items():
            if old in self._trained:
                self._trained.add(new)
        known = {*(str(a.name) for a in self._compilation.spec.adapt), TRAIN}
        self._off, *self._left_out[:] = (
            frozenset({names.get(name, name) for name in off} & known) for off in (self._off, *self._left_out)
        )
        self._show(self._hidden)

    def _take_dropouts(self, names: Mapping[str, str]) -> None:
        """The modules that stand for dropouts of renamed adaptations take over how these were set."""
        for path, module in list(self._dropouts()):
            name = parsed(path)
            if name is not None and name.adaptation in names:
                new = self._store.container(_as(path, names))
                new.p, new.training = module.p, module.training

    def _tidy(self) -> None:
        """Let go of modules that stand for dropouts of adaptations that there are no more."""
        programs = [p for c in self.compilations() for p in c.programs.values() if p.mode == "train"]
        wanted = {path for program in programs for path in dropouts(program)}
        for path, _ in list(self._dropouts()):
            if path not in wanted:
                self._store.drop_container(path)

    def _dropouts(self) -> Iterator[tuple[str, Any]]:
        """Modules that stand for dropouts of adaptations, with their paths."""
        modules = self._store.root.named_modules()
        return ((path, m) for path, m in modules if isinstance(m, nn.Dropout) and parsed(path) is not None)

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


def _steered(steering: Steerings) -> list[str]:
    """Adaptations that have something to be missed."""
    return [*steering.controllers, *steering.objectives]


def _joined(old: Steerings, new: Steerings, names: Mapping[str, str]) -> Steerings:
    """What steers anew, with what steered adaptations that stay: it knows how far it is."""
    before = {new: old for old, new in names.items()}
    for name, controller in new.controllers.items():
        known = old.controllers.get(before.get(name, ""))
        if known is not None:
            controller.total, controller.optimiser = known.total, known.optimiser
    found = (
        {n: own.get(n, v) for n, v in each.items()} for own, each in zip(tables_of(old), tables_of(new), strict=True)
    )
    return Steerings(*found)


def _as(fqn: str, names: Mapping[str, str]) -> str:
    """A tensor's name where adaptations have other names."""
    owner = owner_of(fqn)
    return renamed(fqn, names[owner]) if owner in names else fqn


def _persists(store: Store, fqn: str) -> bool:
    path, _, last = fqn.rpartition(".")
    return last not in store.owner(path)._non_persistent_buffers_set
