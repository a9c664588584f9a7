"""Insert a spec's compositions into one Program: which adaptations are inserted together, and in what form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from graftc.compiler.resolve.resolver import Resolved, place_of
from graftc.compiler.resolve.slots import NAMES, encoded, slot_count, unslotted
from graftc.passes.core.build.bank import Chosen, Mixing, Rows, active, average, by_index, by_weights
from graftc.passes.core.build.batch import BATCH, batch_input
from graftc.passes.core.build.builder import Builder
from graftc.passes.core.ir.program import InputSpec, Program
from graftc.passes.core.ir.shapes import fake_mode_of
from graftc.passes.core.method.insertion import insert_at, prepare
from graftc.passes.core.sites.sites import Applied, LinearSite, Site, SiteKey
from graftc.passes.core.weights.folds import Fold, Keep
from graftc.passes.graph.compose import Member, composed, insert_composed
from graftc.specs.base import Invoked, start_input
from graftc.specs.compose import Average, Bank, CompositionSpec, Fuse, Gate, Parallel, Stack
from graftc.specs.document import Spec
from graftc.specs.errors.diagnostics import GraftError, Place

ACTIVE = "active"
"""Part name of the buffer that contains the bank slot to use if a call does not choose one."""


@dataclass(frozen=True)
class Unit:
    """Adaptations that are inserted together.

    Attributes:
        composition: the composition that combines them; None for a single adaptation.
        members: the adaptations.
        index: index of the composition or adaptation in its list in the spec.
    """

    composition: CompositionSpec | None
    members: tuple[Resolved, ...]
    index: int

    @property
    def name(self) -> str:
        """The name that owns its nodes: that of the composition or of the single adaptation."""
        return self.members[0].name if self.composition is None else str(self.composition.name)

    @property
    def of_one_shape(self) -> bool:
        """Whether its members form one adaptation whose tensors are chosen or averaged."""
        return is_of_one_shape(self.composition)

    @property
    def path(self) -> str:
        """Its path in the spec."""
        return f"{'adapt' if self.composition is None else 'compose'}[{self.index}]"


def is_of_one_shape(composition: CompositionSpec | None) -> bool:
    """Return whether a composition's members form one adaptation whose tensors are chosen or averaged."""
    averaged = isinstance(composition, Average) and composition.of == "parameters"
    return averaged or isinstance(composition, Bank | Parallel)


def units(spec: Spec, resolved: Sequence[Resolved]) -> list[Unit]:
    """Return the adaptations in insertion order, with the members of a composition as one unit."""
    by_name = {item.name: item for item in resolved}
    numbers = {composition.name: number for number, composition in enumerate(spec.compose)}
    by_owner: dict[str, Unit] = {}
    for index, adaptation in enumerate(spec.adapt):
        name = str(adaptation.name)
        composition = spec.composition_of(name)
        if composition is None:
            by_owner[name] = Unit(None, (by_name[name],), index)
        else:
            members = tuple(by_name[member] for member in composition.members)
            by_owner[str(composition.name)] = Unit(composition, members, numbers[composition.name])
    return [by_owner[name] for name in _order(spec, list(by_owner))]


def _order(spec: Spec, names: Sequence[str]) -> list[str]:
    """Return the names in the order of the document, but with all members of a stack at the position of the first."""
    stacks = {name: c for c in reversed(spec.compose) if isinstance(c, Stack) for name in c.members}
    order: dict[str, None] = {}
    for name in names:
        order |= dict.fromkeys(stacks[name].members if name in stacks else [name])
    return list(order)


def narrow_names(spec: Spec) -> frozenset[str]:
    """Return the names of the adaptations and compositions that are stored in the base's dtype.

    These are adaptations with ``dtype: base``, and compositions of only such adaptations. The dtype of other
    adaptations makes no difference, so they can be added and removed. Slots, which do not train, are stored in it too.
    """
    narrow = {str(a.name) for a in spec.adapt if a.dtype == "base"}
    narrow |= {str(c.name) for c in spec.compose if slot_count(c) is not None}
    return frozenset(narrow | {str(c.name) for c in spec.compose if narrow.issuperset(c.members)})


def check_units(spec: Spec, units: Sequence[Unit]) -> None:
    """Check that the members of every composition fit together.

    Raises:
        GraftError: GC036, naming the member that differs.
    """
    for unit in units:
        if unit.composition is None:
            continue
        try:
            _check(unit)
        except GraftError as error:
            raise placed(spec, unit, error) from error


def _check(unit: Unit) -> None:
    assert unit.composition is not None
    first = unit.members[0]
    kind = unit.composition.kind
    for index, member in enumerate(unit.members):
        place = Place(path=f"{kind}[{index}]")
        if unit.of_one_shape and not member.spec.claims.bankable:
            message = f"{member.spec.method} cannot share a {kind}: its tensors cannot be chosen row by row or averaged"
            raise GraftError("GC036", message, place=place)
        if slot_count(unit.composition) is not None:
            reasons = (unslotted(own) for own in (member.spec, *(own for _, own in member.sites)))
            if (reason := next(filter(None, reasons), None)) is not None:
                raise GraftError("GC036", f"{member.name!r} cannot be in a slot: {reason}", place=place)
        if unit.of_one_shape and (difference := _difference(first, member)) is not None:
            hint = "these members may differ only in their names"
            message = f"{member.name!r} and {first.name!r} differ in {difference}"
            raise GraftError("GC036", message, place=place, hint=hint)
        if kind != "gate":
            theirs, ours = ({str(place_of(s)): None for s, _ in m.sites} for m in (member, first))
            odd = [key for key in theirs if key not in ours] + [key for key in ours if key not in theirs]
            if odd:
                message = f"{member.name!r} and {first.name!r} have different places: only one of them has {odd[0]}"
                raise GraftError("GC036", message, place=place, hint="give them the same target")


def _difference(first: Resolved, other: Resolved) -> str | None:
    """Return the first field, other than the name, in which two specs differ; None if they are equal."""
    fields = type(first.spec).model_fields
    if type(other.spec) is not type(first.spec):
        return "method"
    return next((f for f in fields if f != "name" and getattr(first.spec, f) != getattr(other.spec, f)), None)


def placed(spec: Spec, unit: Unit, error: GraftError) -> GraftError:
    """Return an error with its place in the spec; errors of methods and compositions name only one of their fields."""
    return spec.locate(error.within(unit.path))


# --- inputs -------------------------------------------------------------------------------------------------


Control: TypeAlias = CompositionSpec | Invoked
"""The object of a control input: a composition, of which each row uses some members, or an aLoRA, which acts from some
token on."""


def controls(spec: Spec) -> dict[str, Control]:
    """Return the inputs that choose among adaptations, or where they act, by name."""
    inputs: dict[str, Control] = {}
    for adaptation in spec.adapt:
        if isinstance(adaptation, Invoked):
            composition = spec.composition_of(str(adaptation.name))
            owner = composition if composition is not None and is_of_one_shape(composition) else adaptation
            inputs[start_input(str(owner.name))] = adaptation
    for composition in spec.compose:
        if isinstance(composition, Bank):
            inputs |= {composition.ids: composition, composition.mixture: composition}
        elif isinstance(composition, Parallel):
            inputs[f"{composition.name}_ids"] = composition
    return inputs


def add_controls(program: Program, spec: Spec, names: Sequence[str], dtype: torch.dtype) -> None:
    """Add inputs that choose among adaptations, or where they act, to a Program.

    Args:
        program: the Program, changed in place.
        spec: the spec with these adaptations.
        names: the names of the `controls` to add.
        dtype: the dtype of inputs that are weights.

    Raises:
        GraftError: GC037 if no input has a dynamic batch axis, GC038 for both ids and weights of one bank.
    """
    known = controls(spec)
    source = batch_input(program) if names else None
    if names and source is None:
        raise GraftError("GC037", f"none of the inputs {', '.join(program.signature)} has a batch of any size")
    for name in names:
        composition = known[name]
        if isinstance(composition, Bank) and {composition.ids, composition.mixture} <= set(names):
            message = f"{composition.ids} and {composition.mixture} both choose from {composition.name!r}"
            raise GraftError("GC038", message, hint="pass only one of them")
        mixture = isinstance(composition, Bank) and name == composition.mixture
        slots = (composition.size,) if isinstance(composition, Bank) and mixture else ()
        kind = dtype if mixture else torch.int64
        assert source is not None
        with program.graph.inserting_after(program.placeholders()[-1]):
            node = program.graph.placeholder(name)
        with fake_mode_of(program):
            value = torch.empty([source.meta["val"].shape[0], *slots], dtype=kind, device=source.meta["val"].device)
        node.meta = {"val": value, "module": ""}
        ranges = ((0, None), *((number, number) for number in slots))
        program.inputs = (*program.inputs, InputSpec(name, kind, (BATCH, *slots), ranges))


# --- inserting ----------------------------------------------------------------------------------------------

Insert = Callable[[Builder, Resolved], None]
Parts = Mapping[SiteKey | None, dict[str, str]]


def insert_unit(
    unit: Unit, program: Program, spec: Spec, new: Callable[..., Builder], insert: Insert
) -> dict[str, Parts]:
    """Insert a composition into a Program.
    Args:
        unit: the unit to insert; its `composition` is not None.
        program: the Program, changed in place.
        spec: the whole spec.
        new: creates a builder from an owner's name, a method's tag and seams.
        insert: inserts one adaptation with a builder.

    Returns:
        Each owner's tensors, by site and part.

    Raises:
        GraftError: GC036 and others, each with its place in the spec.
    """
    try:
        if unit.of_one_shape:
            return _insert_chosen(unit, program, new, insert)
        return _insert_added(unit, new)
    except GraftError as error:
        raise placed(spec, unit, error) from error


def _insert_chosen(unit: Unit, program: Program, new: Callable[..., Builder], insert: Insert) -> dict[str, Parts]:
    composition, first = unit.composition, unit.members[0]
    assert composition is not None
    inputs = {str(node.target): node for node in program.placeholders()}
    rows = inputs.get(composition.ids if isinstance(composition, Bank) else f"{unit.name}_ids")
    unit_build = new(unit.name, first.spec.method)
    cls: type[Chosen] = Rows
    mixing: Mixing
    slots = slot_count(composition)
    if slots is not None:
        names = [*composition.members, *[None] * (slots - len(composition.members))]
        unit_build.keep_buffer(NAMES, lambda device: encoded(names, device))
    if isinstance(composition, Average):
        cls, mixing = Chosen, average(composition.factors)
    elif isinstance(composition, Bank) and composition.mixture in inputs:
        mixing = by_weights(inputs[composition.mixture], stacked=slots is not None)
    elif rows is not None:
        mixing = by_index(rows, stacked=slots is not None)
    else:
        first_slot = unit_build.buffer(ACTIVE, lambda device: torch.zeros(1, dtype=torch.int64, device=device))
        cls, mixing = Chosen, active(first_slot, stacked=slots is not None)
    seams = cls(composition.members, mixing, getattr(composition, "share", ()), slots)
    build = new(unit.name, first.spec.method, seams=seams)
    insert(build, first)
    for site, _ in first.sites:
        if isinstance(site, LinearSite):
            site.applied[-1] = _stays(unit)
    unused = sorted(seams.share - seams.shared)
    if unused:
        parts = sorted({part for site_parts in seams.parts[first.name].values() for part in site_parts} | seams.shared)
        message = f"{first.spec.method} has no part {unused[0]!r}"
        raise GraftError("GC036", message, place=Place(path="share"), hint=f"it has: {', '.join(parts)}")
    return {**seams.parts, unit.name: {**unit_build.parts, **build.parts}}


def _insert_added(unit: Unit, new: Callable[..., Builder]) -> dict[str, Parts]:
    composition = unit.composition
    assert composition is not None
    build = new(unit.name, composition.kind)
    trains = not (isinstance(composition, Fuse) and composition.train == "fusion")
    by_name: dict[str, Member] = {}
    sites: dict[SiteKey, tuple[Site, list[tuple[str, Any]]]] = {}
    shared: dict[str, Any] = {}
    for item in unit.members:
        gates, method = isinstance(composition, Gate), item.spec.method
        by_name[item.name] = composed(build, item.name, method, trains=trains, attends=gates)
        shared[item.name] = prepare(item.spec, [site for site, _ in item.sites], by_name[item.name].build)
        for site, own in item.sites:
            sites.setdefault(site.key, (site, []))[1].append((item.name, own))
    for site, members in sites.values():
        with build.on(site):
            for name, own in members:
                insert_at(own, site, shared[name], by_name[name].build)
            with ExitStack() as stack:  # a composition may create tensors that belong to its members
                present = [by_name[name] for name, _ in members]
                for each in present:
                    stack.enter_context(each.build.on(site))
                insert_composed(composition, build, site, present)
        if isinstance(site, LinearSite):
            site.applied.append(_stays(unit))
    return {**{name: each.build.parts for name, each in by_name.items()}, unit.name: build.parts}


def _stays(unit: Unit) -> Applied:
    return Applied(unit.name, lambda tensors: Keep("it is a composition of adaptations"), {})


def keep_composed(fold: Fold, unit: Unit) -> Fold:
    """Return a `Keep` with the reason for a composition that must stay; ``fold`` for all others and for averages."""
    if unit.composition is None or (isinstance(unit.composition, Average) and unit.of_one_shape):
        return fold
    added = f"what they add goes through a composition ({unit.composition.kind})"
    return Keep("each call chooses" if unit.of_one_shape else added)


def averaged(
    unit: Unit, parts: Mapping[str, Parts], key: SiteKey | None, get: Callable[[str], Tensor]
) -> Mapping[str, Tensor]:
    """Return a unit's tensors at a place, by part, in float64: its own, or the weighted sum of its members'.

    Each tensor is computed on every read and not cached.
    """
    factors = unit.composition.factors if isinstance(unit.composition, Average) else (1.0,)
    names = [parts.get(member.name, {}) for member, _ in zip(unit.members, factors, strict=False)]
    return _Widened([{**own.get(None, {}), **own.get(key, {})} for own in names], factors, get)


class _Widened(Mapping[str, Tensor]):
    """A mapping from parts to weighted sums of stored tensors, in float64."""

    def __init__(
        self, names: Sequence[Mapping[str, str]], factors: Sequence[float], get: Callable[[str], Tensor]
    ) -> None:
        self._names, self._factors, self._get = names, factors, get

    def __getitem__(self, part: str) -> Tensor:
        first, *others = [self._get(names[part]).detach().double() for names in self._names]
        if not others:
            return first
        return torch.stack([f * t for f, t in zip(self._factors, [first, *others], strict=True)]).sum(0)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names[0])

    def __len__(self) -> int:
        return len(self._names[0])
