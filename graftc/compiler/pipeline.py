"""The pipeline: one explicit list of steps from a model and a spec to verified Programs over one Store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from graftc.compiler.capture import Capture
from graftc.compiler.compose import Unit, averaged, controls, keep_composed, units
from graftc.compiler.copies import untied
from graftc.compiler.defaults import default_signatures
from graftc.compiler.family import Family, compile_family
from graftc.compiler.fingerprint import replaced_tensors
from graftc.compiler.holdings import held_by
from graftc.compiler.interface import Flags
from graftc.compiler.isolation import exclusive
from graftc.compiler.resolve import TRAIN
from graftc.compiler.signature import (
    Axis,
    axes_of,
    described,
    fits,
    less_dynamic,
    signature_of,
    signature_of_program,
    split,
)
from graftc.compiler.source_model import require_plain
from graftc.compiler.tokens import TOKENS, with_room
from graftc.passes.core.folds import FoldStep, Keep, LazyTensors, StandIn, TensorFold, WeightFunction
from graftc.passes.core.layout import Layout
from graftc.passes.core.regions import Region, regions_of
from graftc.passes.core.registry import method_for
from graftc.passes.core.sites import LinearSite, Site, SiteKey
from graftc.passes.core.store import Store
from graftc.passes.core.stored import StoredRows
from graftc.passes.core.uses import Dense
from graftc.specs.compose import CompositionSpec, Parallel
from graftc.specs.diagnostics import GraftError, warn
from graftc.specs.document import Spec


@dataclass
class Compilation:
    """All Programs of one spec and model over one Store.

    Attributes:
        spec: what was asked for.
        model: the source model; read when a new signature has to be captured, never changed.
        store: every tensor.
        seed: what initial values were drawn from.
        families: Programs by signature and fixed sizes.
        variants: keys of `families` by signature: a graph that holds for some sizes only has others beside it.
        parts: adaptation, then site, to Store names by part.
        overlays: base tensors that are trained in place: adaptation, site, base name, rows, trained name.
        notes: what capturing had to change, for people.
        source: the model as it was given; `model` is a copy where the spec unties tensors or adds tokens.
        held: digests of what it held when it was compiled, by name; None where that cannot be written down.
        values: adapter tensors that are there already, by name: those of an artifact.
        known: captures that are there already, by their key.
    """

    spec: Spec
    model: nn.Module
    store: Store
    seed: int = 0
    families: dict[tuple[str, ...], Family] = field(default_factory=dict)
    variants: dict[tuple[str, ...], list[tuple[str, ...]]] = field(default_factory=dict)
    parts: dict[str, dict[SiteKey | None, dict[str, str]]] = field(default_factory=dict)
    overlays: list[tuple[str, SiteKey, str, StoredRows, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    default: tuple[str, ...] = ()
    use_cache: bool = True
    source: nn.Module = field(kw_only=True)
    held: dict[str, str] | None = field(default=None, repr=False)
    values: Mapping[str, Tensor] = field(default_factory=dict)
    known: Mapping[str, Callable[[], Capture]] = field(default_factory=dict)

    @property
    def replaced(self) -> frozenset[str]:
        """Tensors of `source` whose values nothing here depends on: graphs have their own of them."""
        trained = (base for _, _, base, own, _ in self.overlays if own.whole)
        return replaced_tensors(self.store.updated, trained, Store.mirror(self.source).aliases)

    @property
    def main(self) -> Family:
        """The Programs of the signature that was compiled first."""
        return self.families[self.default]

    def find(self, inputs: Mapping[str, Any]) -> tuple[str, ...] | None:
        """The key in `families` of the Programs for a call's tensors and flags; None where there are none yet."""
        for key in self.variants.get(signature_of(inputs), ()):
            if fits(self.families[key].train.inputs, inputs):
                return key
        return None

    def family(self, inputs: Mapping[str, Any]) -> Family:
        """The Programs for a call's tensors and flags, captured when they are first seen.

        Raises:
            GraftError: GC031 for a signature that cannot be captured, or that does not read a place that is adapted.
        """
        found = self.find(inputs)
        if found is not None:
            return self.families[found]
        with exclusive():
            found = self.find(inputs)  # another thread may have made it meanwhile
            return self.families[found] if found is not None else self._new_family(inputs)

    def _new_family(self, inputs: Mapping[str, Any]) -> Family:
        self._look_for_changes()
        tensors, flags = split(inputs)
        chosen = [name for name in self.controls if name in tensors]
        tensors = {name: value for name, value in tensors.items() if name not in chosen}
        self._check_room(tensors)
        known = [Axis(s.name, s.dtype, s.shape) for s in self.main.base.inputs]
        axes = axes_of(self.model, tensors, known)
        failure: GraftError | None = None
        for attempt in less_dynamic(axes, tensors):
            known_before = set(self.families)
            try:
                family = self.add(attempt, flags, chosen)
            except GraftError as error:
                if error.code != "GC030":
                    raise
                failure = failure or error
            else:
                if fits(family.train.inputs, inputs):
                    return family
                if family.key not in known_before:
                    self._forget(family)
        raise self._not_captured(axes, flags, failure)

    def _look_for_changes(self) -> None:
        """Warn, once, where the source model is not what it was: graphs that are made now are of what it is now."""
        if self.held is None:
            return
        now = held_by(self.source)
        changed = [name for name in {**self.held, **(now or {})} if now is None or now.get(name) != self.held.get(name)]
        if not changed:
            return
        where = changed[0].removeprefix("the module").strip()
        message = f"{type(self.source).__name__} has changed since it was compiled"
        message += f" ({where})" if where and now is not None else ""
        message += ": graphs that are made from now on show it, earlier ones do not"
        warn("GC048", message, hint="compile it again")
        self.held = None

    def _forget(self, family: Family) -> None:
        """Let a family go that nobody uses."""
        del self.families[family.key]
        for keys in self.variants.values():
            if family.key in keys:
                keys.remove(family.key)

    def _check_room(self, tensors: Mapping[str, Tensor]) -> None:
        """Whether adaptations that take positions of their own leave enough of them for a text.

        Raises:
            GraftError: GC020.
        """
        own = {spec.name: spec for spec in self.main.train.inputs}
        for source in self.main.source("train").inputs:
            if source.name not in tensors or source.name not in own:
                continue
            axes = own[source.name].shape, own[source.name].ranges, source.ranges
            for size, name, (_, most), (_, before) in zip(tensors[source.name].shape, *axes, strict=False):
                if most is not None and most != before and size > most:
                    message = f"{source.name} has {size} tokens; beside those of its adaptations the model reads {most}"
                    message += f": {why}" if (why := self.main.train.limits.get(str(name))) else ""
                    raise GraftError("GC020", message, hint="shorten the text")

    def _not_captured(self, axes: Sequence[Axis], flags: Flags, failure: GraftError | None) -> GraftError:
        usual = {s.name: s.dtype for s in self.main.base.inputs}
        new = (
            [axis for axis in axes if axis.name not in usual],
            tuple(f for f in flags if f not in self.main.base.flags),
        )
        other = next((axis for axis in axes if axis.dtype != usual.get(axis.name, axis.dtype)), None)
        reason = failure.message if failure is not None else f"{type(self.model).__name__} has none for these sizes"
        hint = failure.hint if failure is not None else "the model may not take inputs of these sizes"
        if any(new):
            hint = f"leave out {described(*new)}"
        elif other is not None:
            hint = f"{other.name} is {_named(other.dtype)}; the model was compiled with {_named(usual[other.name])}"
        return GraftError("GC031", f"no graph can be made: {reason}", hint=hint)

    @cached_property
    def controls(self) -> Mapping[str, CompositionSpec]:
        """Inputs beside the source model's, by which a call chooses among adaptations."""
        return controls(self.spec)

    @cached_property
    def units(self) -> list[Unit]:
        """The adaptations as they are inserted: compositions, and single ones."""
        return units(self.spec, self.main.resolved)

    @cached_property
    def _unit_of(self) -> dict[str, Unit]:
        return {unit.name: unit for unit in self.units}

    @exclusive()
    def add(self, axes: Sequence[Axis], flags: Flags = (), chosen: Sequence[str] = ()) -> Family:
        """Capture one more signature and adapt the same places there.

        Args:
            axes, flags: what the source model is called with.
            chosen: which of `controls` there are beside; those that every call has need not be named.

        Raises:
            GraftError: GC031 where the new graph does not read a place that is adapted.
        """
        always = [name for name, composition in self.controls.items() if isinstance(composition, Parallel)]
        family = compile_family(self, axes, flags, list(dict.fromkeys([*always, *chosen])))
        signature = signature_of_program(family.train.inputs, family.train.flags)
        bounds = [(f"{s.name}.{i}", low, high) for s in family.base.inputs for i, (low, high) in enumerate(s.ranges)]
        key = (*signature, *(f"{axis}={low}" for axis, low, high in bounds if low == high))
        if key in self.families:  # for other sizes of the same inputs the model may compute something else
            key = (*key, *(f"{axis}={low}..{high}" for axis, low, high in bounds))
        if key in self.families:
            return self.families[key]
        family.key = key
        self.families[key] = family
        self.variants.setdefault(signature, []).append(key)
        self.default = self.default or key
        return family

    def again(self, spec: Spec, values: Mapping[str, Tensor], model: nn.Module | None = None) -> Compilation:
        """A Compilation of another spec for the same first signature.

        Args:
            spec: what to adapt there.
            values: adapter tensors to start from, by name.
            model: another base; by default the one that this was given.
        """
        made = compile_model(
            spec,
            self.source if model is None else model,
            self.main.axes,
            flags=self.main.base.flags,
            seed=self.seed,
            use_cache=self.use_cache,
            values=values,
            known=self.known,
        )
        made.values = {}
        return made

    def fold_steps(self, only: Sequence[str] | None = None) -> list[FoldStep]:
        """Every adaptation's change of base tensors, in the order in which they apply: what stands in for tensors, and
        what is made of that, is below everything that stands at sites, and either is in insertion order.

        Raises:
            GraftError: GC050 naming the adaptation that cannot fold and why.
        """
        found = self._unit_of
        names = only if only is not None else [TOKENS, TRAIN, *found]
        below: list[FoldStep] = []
        steps: list[FoldStep] = []
        for name in names:
            below += self._overlay_steps(name)
            own = self.site_steps(found[name]) if name in found else []
            below += [step for step in own if step.layout is Layout.PLAIN]
            steps += [step for step in own if step.layout is not Layout.PLAIN]
        return [*below, *steps]

    def site_steps(self, unit: Unit) -> list[FoldStep]:
        """What an adaptation, or a composition, changes of its sites' weights.

        Raises:
            GraftError: GC050 where it cannot fold, GC022 where something else reads a weight.
        """
        resolved = unit.members[0]
        method = method_for(resolved.spec.method)
        steps: list[FoldStep] = []
        for site, spec in resolved.places:
            tensors = averaged(unit, self.parts, site.key, self.store.get)
            fold = keep_composed(method.fold(spec, site, tensors), unit)
            if isinstance(fold, StandIn):
                continue
            if isinstance(fold, Keep):
                raise GraftError("GC050", f"{unit.name!r} cannot fold at {site.key}: {fold.reason}")
            if isinstance(fold, TensorFold):
                steps += self._tensor_steps(unit.name, site, fold)
                continue
            assert isinstance(site, LinearSite)
            if site.key in resolved.shared:
                raise GraftError(
                    "GC022",
                    f"{unit.name!r} would fold into {site.key}, which {resolved.shared[site.key]}",
                    hint="folding would change both; break the tie in the model first, or leave this site out",
                )
            steps.append(
                FoldStep(
                    unit.name,
                    str(site.key),
                    site.use.weight,
                    site.use.bias or self._new_bias(site),
                    site.rows,
                    site.use.layout,
                    fold.apply,
                    everywhere=True,
                )
            )
        return steps

    def _tensor_steps(self, name: str, site: Site, fold: TensorFold) -> list[FoldStep]:
        steps: list[FoldStep] = []
        for region in regions_of(site, self.store):
            if region.part in fold.changes:
                every, change = StoredRows.every(region.shape), _changed(fold, region)
                key = str(site.key)
                steps.append(
                    FoldStep(name, key, region.tensor, None, every.rows, every.layout, change, everywhere=True)
                )
        return steps

    def _new_bias(self, site: LinearSite) -> str | None:
        """Name of a bias that folding may add; None where the call takes none, or the module has another use of it."""
        name = f"{site.key.module}.bias".lstrip(".")
        return None if not isinstance(site.use, Dense) or name in self.store else name

    def _overlay_steps(self, name: str) -> list[FoldStep]:
        return [
            FoldStep(
                name, str(key), base, None, own.rows, own.layout, _replace(self.store, own, trained), everywhere=True
            )
            for owner, key, base, own, trained in self.overlays
            if owner == name
        ]

    def lazy_tensors(self) -> LazyTensors:
        """The folded tensors: every base tensor that an adaptation changes, computed when asked for."""
        return LazyTensors(self.store, self.fold_steps())


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _changed(fold: TensorFold, region: Region) -> Callable[..., Any]:
    return lambda tensor, bias: (fold.changes[region.part](tensor), bias)


def _replace(store: Store, own: StoredRows, trained: str) -> WeightFunction:
    def stand_in(_: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return own.layout.orient(store.get(trained).detach().to(torch.float64, copy=True)), bias

    return stand_in


@exclusive()
def compile_model(
    spec: Spec,
    model: nn.Module,
    axes: Sequence[Axis] | None = None,
    *,
    flags: Flags = (),
    seed: int = 0,
    use_cache: bool = True,
    values: Mapping[str, Tensor] = MappingProxyType({}),
    known: Mapping[str, Callable[[], Capture]] = MappingProxyType({}),
) -> Compilation:
    """Compile a spec against a model. The model is never changed.

    Args:
        spec: what to adapt.
        model: any module that torch.export captures.
        axes: its inputs; the model's usual ones by default.
        flags: other keyword arguments of its calls.
        seed: initial values are drawn from it.
        use_cache: look up and keep the captured graph in the user's cache folder.
        values: adapter tensors to start from instead of initial values, by name.
        known: captures to use instead of capturing, by their key.

    Raises:
        GraftError: with a code for whatever is wrong with the spec, the model or their fit.
    """
    require_plain(model)
    source = model
    try:
        if spec.untie:
            model = untied(model, spec.untie, axes)
        if spec.tokens is not None:
            model = with_room(model, spec.tokens)
    except GraftError as error:
        raise spec.locate(error) from error
    compilation = Compilation(
        spec, model, Store.mirror(model), seed, use_cache=use_cache, source=source, values=values, known=known
    )
    compilation.held = held_by(source)
    first_capture(model, axes, lambda attempt: compilation.add(attempt, flags))
    return compilation


T = TypeVar("T")


def first_capture(model: nn.Module, axes: Sequence[Axis] | None, run: Callable[[Sequence[Axis]], T]) -> T:
    """What ``run`` gives for the first inputs that can be captured: those shown or the model's usual ones, then the
    same with fixed sizes.

    Raises:
        GraftError: GC030, the first of its kind, when none can be.
    """
    choices = [list(axes)] if axes is not None else list(default_signatures(model))
    attempts = [list(less_dynamic(choice)) for choice in choices]
    failure: GraftError | None = None
    for attempt in [first for first, *_ in attempts] + [other for _, *others in attempts for other in others]:
        try:
            return run(attempt)
        except GraftError as error:
            if error.code != "GC030":
                raise
            failure = failure or error
    assert failure is not None
    raise failure
