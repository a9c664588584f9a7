"""`Selection`: the places that a target would select; count, inspect and combine them before writing a spec."""

from __future__ import annotations

import copy
import operator
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

from graftc.compiler.resolve.matching import Meant
from graftc.compiler.resolve.select import meant
from graftc.compiler.resolve.selectable import Selectable, SelectedPlace
from graftc.compiler.resolve.targets import exact_target, kinds_of
from graftc.passes.core.grouping import grouped
from graftc.specs.claims import SiteKind
from graftc.specs.errors.arguments import kind_of
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.errors.markup import Html, bullets, joined, lines, table, tag
from graftc.specs.errors.text import counted, format_layers, one_line
from graftc.specs.patterns import as_items, write_items
from graftc.specs.target import AsTarget, Target, written_fields

_WHERE = "selection"
_WEIGHTS = frozenset({SiteKind.LINEAR, SiteKind.EMBEDDING, SiteKind.EXPERTS})
"""The kinds of site that a path selects if neither a role nor a method determines the kind."""
_NO_ROLE = "a selection without a role or a method"
_LINES = 40
"""Maximum number of lines in a printed table."""
_HEADINGS = ("role", "place", "rows", "layers", "kind", "shape", "parameters", "evidence")


class Selection(AsTarget):
    """A set of places in a model. Immutable: every method returns a new selection.

    `graftc.select` creates a selection of all linear, embedding and expert weights, or of all places whose kind a
    method takes. Each method narrows a selection as the field of the same name narrows a target; alternatives go into
    one call (``role("attn.q", "attn.v")``) or are joined with ``|``. ``&`` and ``-`` work as for sets. `len` counts the
    places, and iteration yields each as a `SelectedPlace`, in model order.

    A role may select any kind of site. A path alone selects whole weights, as in a target; rows of fused weights are
    selected by role.

    A pattern that matches nothing is not an error while a selection is being built: printing the selection shows what
    came closest, and `to_target` raises the error.
    """

    def __init__(self, places: Selectable, *, method: str | None = None) -> None:
        """Select all places that a method takes.

        Args:
            places: the places of a model.
            method: the method's tag; None to select weights and, by role, any other kind of place.

        Raises:
            GraftError: GC004 if the method is unknown.
        """
        self._places, self._method = places, method
        self._within: frozenset[Hashable] | None = None
        self._written: Target | None = Target()
        self._said = "" if method is None else f"all that {method} takes"
        self._before: tuple[GraftError, ...] = ()
        self._remarks: tuple[str, ...] = ()
        self._meant = self._matched(Target())

    # --- narrowing -----------------------------------------------------------------------------------------

    def role(self, *roles: str) -> Selection:
        """Select the places with any of these roles; braces are allowed: ``attn.{q,v}``.

        Raises:
            GraftError: GC012 for a role that does not exist, GC002 for a value that is not a role.
        """
        return self._narrowed("role", roles)

    def modules(self, *globs: str) -> Selection:
        """Select the places whose module path matches any of these globs: ``*``, ``**`` and ``{a,b}`` as in a target.

        Raises:
            GraftError: GC002 or GC009 for a value that is not a glob.
        """
        return self._narrowed("modules", globs)

    def regex(self, *patterns: str) -> Selection:
        """Select the places whose whole module path matches any of these regular expressions.

        Raises:
            GraftError: GC002 or GC009 for a value that is not a regular expression, GC008 for one that takes too long.
        """
        return self._narrowed("regex", patterns)

    def layers(self, *layers: int | str) -> Selection:
        """Select the places in these layers of each stack: indices or slices (``"0:6"``); negatives count from the end.

        Raises:
            GraftError: GC002 for a value that is neither a layer nor a slice.
        """
        return self._narrowed("layers", layers)

    def exclude(self, *globs: str) -> Selection:
        """Drop the places whose module path matches any of these globs.

        Raises:
            GraftError: GC002 or GC009 for a value that is not a glob.
        """
        return self._narrowed("exclude", globs)

    def _narrowed(self, name: str, values: Sequence[Any]) -> Selection:
        given = tuple(v for value in values for v in (as_items(value) if isinstance(value, list | tuple) else (value,)))
        if not given:
            raise GraftError(
                "GC002", f"{name}() was given no arguments", hint=f"pass what a target's {name} field accepts"
            )
        items: Any = given[0] if len(given) == 1 else given
        current = None if self._written is None else getattr(self._written, name)
        if self._written is None or (current is not None and name != "exclude"):
            target = Target(**{name: items})
            return self._like(target, within=self._keys, said=self._expression, before=self._faults)
        if current is not None:
            items = (*as_items(current), *given)
        return self._like(Target(**{**written_fields(self._written), name: items}))

    # --- combining -----------------------------------------------------------------------------------------

    def __or__(self, other: object) -> Selection:
        return self._combined("|", other, operator.or_)

    def __and__(self, other: object) -> Selection:
        return self._combined("&", other, operator.and_)

    def __sub__(self, other: object) -> Selection:
        return self._combined("-", other, operator.sub)

    def _combined(self, sign: str, other: object, combine: Any) -> Selection:
        if not isinstance(other, Selection):
            return NotImplemented  # type: ignore[no-any-return]
        two: Selection = other
        if not self._same_model(two):
            message = f"the selections are from models with different places: {self._places.model}, {two._places.model}"
            raise GraftError("GC073", message, hint="select both from the same model")
        keys = combine(self._keys, two._keys)
        return self._like(
            None,
            meant=Meant([c for c in self._places.candidates if c.key in keys]),
            within=None,
            said=f"({self._expression}) {sign} ({two._expression})",
            before=tuple(dict.fromkeys((*self._faults, *two._faults))),
            method=self._method if self._method == two._method else None,
            remarks=tuple(dict.fromkeys((*self._remarks, *two._remarks, *self._fused_with(two)))),
        )

    def _fused_with(self, other: Selection) -> list[str]:
        """Return a note if one selection has part of a fused weight and the other has all of it, as another place."""
        chosen = (self._meant.chosen, other._meant.chosen)
        for one, two in (chosen, chosen[::-1]):
            whole = {c.module for c in two if not c.part and c.kind in _WEIGHTS}
            part = next((c for c in one if c.part and c.module in whole), None)
            if part is not None:
                names = f"{one_line(part.name)} and {one_line(part.module)}"
                return [f"note: {names} are two places, part of a weight and all of it; use a role on both sides"]
        return []

    @property
    def _keys(self) -> frozenset[Hashable]:
        return frozenset(c.key for c in self._meant.chosen)

    def _same_model(self, other: Selection) -> bool:
        return self._places is other._places or self._places.candidates == other._places.candidates

    def _like(self, written: Target | None, **changes: Any) -> Selection:
        """Return a copy with another target, which is matched if not None, and with some attributes changed."""
        copied: Selection = copy.copy(self)
        for name, value in {**changes, "written": written}.items():
            setattr(copied, f"_{name}", value)
        if written is not None:
            copied._meant = copied._matched(written)
        return copied

    @property
    def _faults(self) -> tuple[GraftError, ...]:
        """The errors of all patterns from which the selection was built."""
        return (*self._before, *self._meant.faults)

    @property
    def _notes(self) -> tuple[GraftError, ...]:
        return (*self._faults, *self._meant.gaps)

    def _matched(self, target: Target) -> Meant:
        kinds = None if self._method is None else kinds_of(self._method)
        if self._within is not None:
            kinds = None
        elif kinds is None and target.role is None:
            kinds = _WEIGHTS
        return meant(
            target,
            self._places.candidates,
            _WHERE,
            kinds=kinds,
            method=self._method or _NO_ROLE,
            missing=self._places.missing,
            within=self._within,
        )

    # --- counting ------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._meant.chosen)

    def __iter__(self) -> Iterator[SelectedPlace]:
        return (self._places.places[c.key] for c in self._meant.chosen)

    def __contains__(self, place: object) -> bool:
        """Return whether a place, or any place with that module path or name, is selected."""
        return any(place in (selected, selected.module, selected.name) for selected in self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Selection) and self._keys == other._keys and self._same_model(other)

    def __hash__(self) -> int:
        return hash(self._keys)

    @property
    def parameters(self) -> int:
        """The number of elements in the selected tensors; one in several places, such as a tied tensor, counts once."""
        return sum({(place.tensors, place.rows): place.parameters for place in self}.values())

    def expect(self, count: int) -> Selection:
        """Return the same selection if it has the expected number of places.

        Args:
            count: the expected number, at least 0.

        Raises:
            GraftError: GC013 if the number differs, with each pattern's count and what came closest; GC073 if ``count``
                is not a non-negative integer.
        """
        count = _count(count)
        if len(self) == count:
            return self
        message = f"the selection has {counted(len(self))}, expected {count}"
        details: list[str | GraftError] = [error.message for error in self._notes]
        if self._written is not None and count:
            faults = self._matched(self._written.model_copy(update={"expect": count})).faults
            details[:0] = [detail for error in faults if error.code == "GC013" for detail in error.details]
        raise GraftError("GC013", message, place=Place(path=f"{_WHERE}.expect"), details=list(dict.fromkeys(details)))

    def to_target(self, method: str | None = None) -> Target:
        """Return a target that selects exactly these places in this model.

        The target is verified by resolving it. It contains the number of places (``expect``), so that a method or model
        with a different number of them raises an error.

        The fields are those of the calls that built the selection. For a combined selection, suitable fields are
        chosen: roles, roles in layers, or a list of modules.

        Args:
            method: the method that the target is for; by default the one passed to `graftc.select` or, if none was
                passed, any method that takes such sites.

        Raises:
            GraftError: GC014 for an empty selection; GC011, GC014 or GC015 for a pattern that matches nothing; GC016
                for sites that the method does not take; GC017 and GC023 for a place that no method can adapt; GC093 if
                no target selects exactly these places.
        """
        if self._faults:
            raise copy.copy(self._faults[0])
        written = self._written if self._within is None else None
        return exact_target(self._places, self._keys, written, method or self._method)

    # --- inspecting ----------------------------------------------------------------------------------------

    @property
    def _expression(self) -> str:
        """The steps that built the selection, written as a target's fields."""
        values = {name: getattr(self._written, name, None) for name in Target.model_fields}
        fields = ", ".join(f"{name}: {write_items(value)}" for name, value in values.items() if value is not None)
        return f"({self._said}) & {fields}" if self._said and fields else self._said or fields or "all"

    @property
    def _title(self) -> str:
        summary = f"{counted(len(self))} of {self._places.model}"
        return f"{summary}, {self.parameters:,} parameters: {one_line(self._expression, 400)}"

    def rows(self) -> list[tuple[str, ...]]:
        """Return the rows of a table: role, place, rows, layers, kind, shape, parameters and evidence.

        Equal layers of a stack share a row, which shows their total number of parameters and the first one's evidence.
        """
        result: list[tuple[str, ...]] = []
        for (role, starred, rows, kind, shape), sites in grouped(self, _common).items():
            layers = format_layers(site.layer for site in sites if site.layer is not None)
            count = f"{sum(site.parameters for site in sites):,}"
            result.append((role, starred, rows, layers, kind, shape, count, sites[0].evidence))
        return result

    def notes(self) -> list[str]:
        """Return the patterns that matched nothing, with what came closest, and the layers that lack a role."""
        return [*(str(error) for error in self._notes), *self._remarks]

    def __repr__(self) -> str:
        rows = [tuple(one_line(cell, 80) for cell in row) for row in self.rows()]
        text = [f"Selection of {self._title}"]
        if rows:
            shown = [_HEADINGS, *rows[:_LINES]]
            widths = [max(len(row[column]) for row in shown) for column in range(len(_HEADINGS))]
            text += [
                "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                for row in shown
            ]
        if len(rows) > _LINES:
            text.append(f"  and {len(rows) - _LINES} more lines")
        return "\n".join([*text, *self.notes()])

    def _repr_html_(self) -> str:
        title = joined([Html("<b>Selection</b>"), f"of {self._title}"], " ")
        body = table(_HEADINGS, self.rows(), numbers=("parameters",))
        return Html(tag("div", title, 1_000) + body + bullets(map(lines, self.notes())))

    def to_json(self) -> dict[str, Any]:
        """Return plain values: the model's class, how the selection was built, its places, and its notes."""
        return {
            "model": self._places.model,
            "method": self._method,
            "selection": self._expression,
            "count": len(self),
            "parameters": self.parameters,
            "places": [place.to_json() for place in self],
            "notes": [error.to_json() for error in self._notes],
            "remarks": list(self._remarks),
        }


def _common(site: SelectedPlace) -> tuple[str, str, str, str, str]:
    """Return the cells that are the same for all sites in one row of the table."""
    return ", ".join(site.roles), site.starred, site.rows_text, str(site.kind), " x ".join(map(str, site.shape))


def _count(value: Any) -> int:
    """Return the value if it is a valid number of sites, otherwise raise GC073."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    shown = value if isinstance(value, int) and not isinstance(value, bool) else kind_of(value)
    raise GraftError("GC073", f"the number of sites cannot be {shown}", hint="pass a non-negative integer")
