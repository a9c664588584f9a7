"""Derive specs with an adaptation added, removed or renamed, for changes to a live model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from graftc.specs.base import MethodSpec, check_name
from graftc.specs.compose import CompositionSpec, Stack
from graftc.specs.document import Spec, named
from graftc.specs.errors.diagnostics import GraftError


def replacing(spec: Spec, **fields: Any) -> Spec:
    """Return the spec with other values for some fields, validated as a whole; fields that were not set stay unset.

    Raises:
        GraftError: GC002 to GC012 if the result is invalid.
    """
    return Spec.model_validate({**{field: getattr(spec, field) for field in spec.model_fields_set}, **fields})


def adding(spec: Spec, adaptation: MethodSpec | Mapping[str, Any]) -> Spec:
    """Return the spec with one more adaptation at its end.

    Raises:
        GraftError: GC002 to GC012 for an invalid entry, GC005 for a name that is taken.
    """
    (own,) = Spec.model_validate({"adapt": [adaptation]}).adapt
    own_name = adaptation.name if isinstance(adaptation, MethodSpec) else dict(adaptation).get("name")
    taken = _names(spec)
    if own_name in taken:
        raise GraftError("GC005", f"the name {own_name!r} is taken", hint="names are unique")
    if own_name is None:
        own = named(own.model_copy(update={"name": None}), own.method, taken)
    return spec.model_copy(update={"adapt": (*spec.adapt, own)})


def renaming(spec: Spec, old: str, new: str) -> Spec:
    """Return the spec with one adaptation renamed.

    Raises:
        GraftError: GC002 for an invalid name, GC005 for one that is taken.
    """
    if (error := check_name(new)) is not None:
        raise error
    if new in _names(spec):
        raise GraftError("GC005", f"the name {new!r} is taken", hint="names are unique")
    (own,) = (a for a in spec.adapt if a.name == old)
    adapt = tuple(a.model_copy(update={"name": new}) if a is own else a for a in spec.adapt)
    compose = tuple(
        c.model_copy(update={c.kind: tuple(new if member == old else member for member in c.members)})
        for c in spec.compose
    )
    return spec.model_copy(update={"adapt": adapt, "compose": compose})


def leaving(spec: Spec, names: Collection[str], *, train: bool = True) -> Spec:
    """Return the spec without some adaptations, and without the compositions that consist of them.

    Args:
        spec: the spec.
        names: names of the adaptations to remove.
        train: whether to keep the ``train:`` list.

    Raises:
        GraftError: GC036 if a composition would lose a member.
    """
    gone = set(names)
    for composition in (c for c in spec.compose if not isinstance(c, Stack)):
        lost = gone & set(composition.members)
        if lost and len(lost) < len(composition.members):
            message = f"{min(lost)!r} is part of {composition.name!r}, which needs it"
            hint = f"name {composition.name!r}, or all of {', '.join(composition.members)}"
            raise GraftError("GC036", message, hint=hint)
        gone |= {str(composition.name)} if lost else set()
    compose = tuple(remaining for c in spec.compose if (remaining := _left(c, gone)) is not None)
    adapt = tuple(a for a in spec.adapt if a.name not in gone)
    return spec.model_copy(update={"adapt": adapt, "compose": compose, "train": spec.train if train else ()})


def _names(spec: Spec) -> set[str]:
    return {str(entry.name) for entry in (*spec.adapt, *spec.compose)}


def _left(composition: CompositionSpec, gone: Collection[str]) -> CompositionSpec | None:
    """Return what remains of a composition: a stack with its remaining members; other kinds whole or not at all."""
    if not isinstance(composition, Stack):
        return None if composition.name in gone else composition
    left = tuple(member for member in composition.members if member not in gone)
    return composition.model_copy(update={composition.kind: left}) if len(left) >= composition.least else None
