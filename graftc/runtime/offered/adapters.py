"""Add, remove, rename or disable a compiled model's adaptations while the others keep training.

A change is compiled in a separate Store and then applied to the model's own. Kept tensors remain the same objects,
so that optimisers still recognise them, and any failure occurs before anything has changed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from graftc.compiler.capture.isolation import exclusive
from graftc.compiler.compilation import Compilation
from graftc.compiler.inspect.snapshot import adapter_values
from graftc.compiler.pipeline import recompile
from graftc.compiler.resolve.train import TRAIN
from graftc.compiler.roles.structure import Structure, roles_of
from graftc.compiler.steering import Steerings, steerings
from graftc.passes.core.ir.eval_mode import dropouts
from graftc.passes.core.weights.names import owner_of, parsed, renamed
from graftc.runtime.interop.peft.several import entry_of, names_of
from graftc.runtime.model.feature import Feature
from graftc.runtime.model.views import Tables, over, tables_of
from graftc.runtime.offered.state_dicts import persists
from graftc.runtime.training.steering import watch_training
from graftc.specs.base import MethodSpec
from graftc.specs.changes import adding, leaving, renaming
from graftc.specs.document import Spec
from graftc.specs.errors.diagnostics import GraftError, unknown_name


class Adapters(Feature):
    """Changes which adaptations a compiled model has and which of them have an effect."""

    @exclusive()
    def add(
        self, adaptation: MethodSpec | Mapping[str, Any], values: Mapping[str, Tensor] | None = None
    ) -> dict[str, nn.Parameter]:
        """Add an adaptation on top of the existing ones; it takes effect with the next call.

        Args:
            adaptation: an entry as in a spec's ``adapt`` list.
            values: initial tensors, by their names in this model.

        Returns:
            The new trainable parameters by name, for ``optimizer.add_param_group``;
            ``graftc.optim.param_groups(compiled, lr, only=[name])`` returns them in groups.

        Raises:
            GraftError: as for `graftc.compile`; GC005 for a name that is taken, GC053 for values that do not match,
                GC072 if the model's tensors are sharded. In all cases, nothing has changed.
        """
        self._require_whole()
        spec = adding(self.runner.compilation.spec, adaptation)
        name = str(spec.adapt[-1].name)
        given = dict(values or {})
        other = sorted(fqn for fqn in given if owner_of(fqn) != name)
        if other:
            raise GraftError(
                "GC053", f"{other[0]} is not a tensor of {name!r}", hint="pass only this adaptation's tensors"
            )
        compilation = recompile(self.runner.compilation, spec, {**dict(adapter_values(self.runner.store)), **given})
        unknown = sorted(given.keys() - {fqn for fqn, _ in compilation.store.adapters()})
        if unknown:
            raise GraftError("GC053", f"{name!r} has no tensor {unknown[0]}")
        self._take(compilation, {})
        added = ((fqn, t) for fqn, t in self.runner.store.adapters() if owner_of(fqn) == name)
        return {fqn: t for fqn, t in added if isinstance(t, nn.Parameter) and t.requires_grad}

    def load_adapter(self, folder: str | Path, name: str | None = None) -> dict[str, nn.Parameter]:
        """Add the adaptation from a folder written by PEFT, on top of the existing ones.

        It takes effect with the next call; ``disable(name)`` switches it off.

        Args:
            folder: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
            name: the adaptation's name in this model; by default the folder's name.

        Returns:
            The new trainable parameters by name, as for `add`.

        Raises:
            GraftError: as for `graftc.import_peft` and `add`; GC112 if the adapter also trains entire modules of the
                base or, in addition to its method, rows of a table: import such an adapter together with the others.
                In all cases, nothing has changed.
        """
        self._require_whole()
        [(adaptation, path)] = names_of([folder] if name is None else {name: folder}).items()
        if any(entry.name == adaptation for entry in self.runner.spec.adapt):
            message = f"the name {adaptation!r} is taken by another adaptation"
            raise GraftError("GC005", message, hint="pass another name")
        base = self.runner.compilation
        capture, flags = base.main.captures[0], base.program("train", "base").flags

        def structure() -> Structure:
            return roles_of(capture.program, capture.constants)

        return self.add(*entry_of(path, adaptation, base.source, base.main.axes, flags, structure))

    @exclusive()
    def remove(self, name: str) -> None:
        """Remove an adaptation and its tensors.

        An existing optimiser still references the tensors, which have no gradients, so no step changes them; create a
        new optimiser to free the memory.

        Args:
            name: the adaptation's name.

        Raises:
            GraftError: GC091 if there is no such adaptation, GC036 if it is part of a composition, GC072 if the model's
                tensors are sharded. In all cases, nothing has changed.
        """
        self._require_whole()
        spec = self._spec_with(name)
        if spec.composition_of(name) is not None:
            hint = "compile a spec without the composition and its adaptations"
            raise GraftError("GC036", f"{name!r} is part of a composition", hint=hint)
        kept = {fqn: t for fqn, t in adapter_values(self.runner.store) if owner_of(fqn) != name}
        self._take(recompile(self.runner.compilation, leaving(spec, {name}), kept), {})

    @exclusive()
    def rename(self, old: str, new: str) -> None:
        """Rename an adaptation and its tensors, which remain the same objects.

        Args:
            old: the current name.
            new: the new name.

        Raises:
            GraftError: GC091 if there is no such adaptation, GC005 for a name that is taken, GC002 for an invalid new
                name, GC072 if the model's tensors are sharded. In all cases, nothing has changed.
        """
        self._require_whole()
        spec = self._spec_with(old)
        if old == new:
            return
        values = {_as(fqn, {old: new}): tensor for fqn, tensor in adapter_values(self.runner.store)}
        self._take(recompile(self.runner.compilation, renaming(spec, old, new), values), {old: new})

    def disable(self, *names: str) -> None:
        """Leave adaptations out of all calls until `enable`; ``compiled.disabled(name)`` does so for one block.

        Their tensors stay: `save` and `merge` include them. They are not trained meanwhile, since no loss depends on
        them.

        The first time takes as long as compiling without a capture; after that, it costs next to nothing.

        Args:
            names: adaptations or compositions; ``trained`` is the ``train:`` list.

        Raises:
            GraftError: GC091 if there is no such adaptation, GC036 for a part of a composition. In both cases, nothing
                has changed.
        """
        left = self.runner.leaving
        off = left.off | self.runner.adaptations(names)
        self.runner.show(left.hidden | off)
        left.off = off

    def enable(self, *names: str) -> None:
        """Undo `disable` for the named adaptations, or for all of them if none is named.

        Args:
            names: adaptations or compositions; ``trained`` is the ``train:`` list.

        Raises:
            GraftError: GC091 if there is no such adaptation.
        """
        left = self.runner.leaving
        off = left.off - self.runner.adaptations(names) if names else frozenset()
        self.runner.show(off.union(*left.within))
        left.off = off

    @contextmanager
    def disabled(self, *names: str) -> Iterator[None]:
        """Run the block without the named adaptations, or with the base alone if none is named.

        With ``parallel``, the base's rows are returned once for each adaptation, so that calls return the same number
        of rows as outside the block.

        Leaving out a set of adaptations for the first time takes as long as compiling without a capture; after that, it
        costs next to nothing.

        Args:
            names: adaptations or compositions to leave out; ``trained`` is the ``train:`` list. By default all of them.

        Raises:
            GraftError: GC091 if there is no such adaptation, GC036 for a part of a composition.
        """
        if names:
            with self.runner.without(names):
                yield
            return
        with self.runner.running_base():
            yield

    def each_alone(self, names: Collection[str]) -> list[Any]:
        """Return a compiled model for each imported folder, given the names of the folders' adaptations."""
        existing = [str(entry.name) for entry in self.runner.spec.adapt]
        groups = ([name, *(f"{name}_{number}" for number in range(1, len(existing)))] for name in names)
        # A numbered name stands for rows of a table from the same folder, unless another folder has that name.
        members = [[n for n in group if n in existing and (n == group[0] or n not in names)] for group in groups]
        return [self.runner.alone(tuple(group)) for group in members]

    def _take(self, taken: Compilation, names: Mapping[str, str]) -> None:
        """Replace the model's Compilation: move renamed tensors, add new ones, and drop those no longer needed."""
        runner, store, whole, shown = self.runner, self.runner.store, self.runner.everything, self.runner.shown
        fresh = taken.store
        wanted = dict(fresh.adapters())
        existing = {_as(fqn, names): (fqn, tensor) for fqn, tensor in store.adapters()}
        tables = Tables(store)
        compilation, settled = runner.compilation, set(store.settled)
        try:
            for fqn, tensor in wanted.items():
                if fqn in existing and existing[fqn][0] != fqn:
                    tables.put(fqn, existing[fqn][1], persistent=persists(fresh, fqn))
                elif fqn not in existing:
                    tables.put(fqn, runner.here(tensor), persistent=persists(fresh, fqn))
            taken = over(taken, compilation)
            runner.compilation = taken
            steering = _joined(whole, steerings(taken), names)
            runner.shown = runner.view_of(taken, steering, frozenset())
        except BaseException:
            tables.undo()
            runner.compilation, store.settled, runner.shown = compilation, settled, shown
            self._tidy()
            raise
        self._take_dropouts(names)
        updated = set(store.updated.values())
        for fqn, (old, tensor) in existing.items():
            if old not in wanted and old not in updated:
                store.drop(old)
            if fqn not in wanted:
                tensor.grad = None
        store.settled = {_as(fqn, names) for fqn in settled} & wanted.keys() | fresh.settled
        self._forget(names)
        self._tidy()
        watch_training(runner, {*_steered(steering)} - {names.get(n, n) for n in _steered(whole)})

    def _forget(self, names: Mapping[str, str]) -> None:
        """Discard everything derived from the previous Compilation, and update the recorded names of adaptations."""
        runner, left, trained = self.runner, self.runner.leaving, self.runner.progress.trained
        runner.views.clear()
        runner.derived.clear()
        self._prune()
        trained.update(new for old, new in names.items() if old in trained)
        known = {*(str(a.name) for a in runner.compilation.spec.adapt), TRAIN}
        left.off, *left.within[:] = (
            frozenset({names.get(name, name) for name in off} & known) for off in (left.off, *left.within)
        )
        runner.show(left.hidden)

    def _take_dropouts(self, names: Mapping[str, str]) -> None:
        """Copy the settings of modules that represent dropouts of renamed adaptations to the new modules."""
        for path, module in list(self._dropouts()):
            name = parsed(path)
            if name is not None and name.adaptation in names:
                new = self.runner.store.container(_as(path, names))
                new.p, new.training = module.p, module.training

    def _tidy(self) -> None:
        """Remove the modules that represent dropouts of adaptations that no longer exist."""
        programs = [p for c in self.runner.compilations() for p in c.programs.values() if p.mode == "train"]
        wanted = {path for program in programs for path in dropouts(program)}
        for path, _ in list(self._dropouts()):
            if path not in wanted:
                self.runner.store.drop_container(path)

    def _dropouts(self) -> Iterator[tuple[str, Any]]:
        """Return the modules that represent adaptations' dropouts, each with its path."""
        modules = self.runner.store.root.named_modules()
        return ((path, m) for path, m in modules if isinstance(m, nn.Dropout) and parsed(path) is not None)

    def _prune(self) -> None:
        """Delete the code that no longer belongs to a view."""
        label = self.runner.shown.label
        for block in self.runner.blocks.values():
            code = block._graftc
            tables: tuple[dict[str, Any], ...] = (code.functions, code.borders, code.calls)
            for table in tables:
                for key in [key for key in table if not key.startswith(label)]:
                    del table[key]

    def _spec_with(self, name: str) -> Spec:
        """Return the spec; raise GC091 if it has no adaptation with this name."""
        known = [str(a.name) for a in self.runner.spec.adapt]
        if name not in known:
            raise unknown_name("adaptation", name, known)
        return self.runner.spec

    def _require_whole(self) -> None:
        """Raise GC072 if tensors are sharded, since engines have already recorded the parameters."""
        if any(hasattr(tensor, "device_mesh") for _, tensor in self.runner.store.tensors()):
            hint = "call add, remove and rename before fully_shard; disable() and disabled() also work afterwards"
            raise GraftError("GC072", "the model's tensors are sharded over processes", hint=hint)


def _steered(steering: Steerings) -> list[str]:
    """Return the names of the adaptations that have a controller or an objective."""
    return [*steering.controllers, *steering.objectives]


def _joined(old: Steerings, new: Steerings, names: Mapping[str, str]) -> Steerings:
    """Return the new steerings, reusing the existing objects for adaptations that stay, to preserve their progress."""
    before = {new: old for old, new in names.items()}
    for name, controller in new.controllers.items():
        known = old.controllers.get(before.get(name, ""))
        if known is not None:
            controller.total, controller.optimiser = known.total, known.optimiser
    tables = (
        {n: old_table.get(n, v) for n, v in new_table.items()}
        for old_table, new_table in zip(tables_of(old), tables_of(new), strict=True)
    )
    return Steerings(*tables)


def _as(fqn: str, names: Mapping[str, str]) -> str:
    """Return a tensor's name after adaptations have been renamed."""
    owner = owner_of(fqn)
    return renamed(fqn, names[owner]) if owner in names else fqn
