"""Selections: the places that a target would select, to count, look at and combine before a spec is written."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

from graftc.compiler.resolve.candidates import Candidate
from graftc.compiler.resolve.select import Meant, meant
from graftc.compiler.resolve.selectable import Selectable, SelectedPlace
from graftc.compiler.resolve.targets import exact_target, kinds_of
from graftc.compiler.roles.findings import format_layers
from graftc.specs.claims import SiteKind
from graftc.specs.errors.arguments import kind_of
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.errors.markup import Html, bullets, joined, lines, table, tag
from graftc.specs.errors.text import counted, one_line
from graftc.specs.patterns import as_items, write_items
from graftc.specs.target import AsTarget, Target

__all__ = ["Selection"]

_WHERE = "selection"
_WEIGHTS = frozenset({SiteKind.LINEAR, SiteKind.EMBEDDING, SiteKind.EXPERTS})
"""What a path stands for where neither a role nor a method says what kind of site is meant."""
_NO_ROLE = "a selection without a role or a method"
_LINES = 40
"""Lines of a printed table."""
_HEADINGS = ("role", "place", "rows", "layers", "kind", "shape", "parameters", "evidence")


class Selection(AsTarget):
    """Some places of a model. Immutable: every method gives another selection.

    Made by `graftc.select`, which gives all weights of linear maps, embeddings and experts, or all places of the kinds
    that a method takes. Each method narrows a selection as the field of its name narrows a target; what is meant as an
    alternative goes into one call (``role("attn.q", "attn.v")``) or is joined with ``|``. ``&`` and ``-`` are those of
    sets. `len` counts places and iterating gives each as a `SelectedPlace`, in the order of the model.

    A role may name any kind of site. A path alone means weights as a whole, as in a target: rows of fused weights are
    selected by role.

    A pattern that matches nothing is not an error while a selection is built; printing says what came closest, and
    `to_target` raises it.
    """

    __slots__ = (
        "_before",
        "_found",
        "_keys",
        "_kinds",
        "_method",
        "_places",
        "_remarks",
        "_said",
        "_within",
        "_written",
    )

    def __init__(self, places: Selectable, *, method: str | None = None) -> None:
        """All places that a method takes.

        Args:
            places: of a model.
            method: the tag of the method; None for weights, and whatever a role names.

        Raises:
            GraftError: GC004 for a method that is unknown.
        """
        self._places, self._method = places, method
        self._kinds = None if method is None else kinds_of(method)
        self._within: frozenset[Hashable] | None = None
        self._written: Target | None = Target()
        self._said = "" if method is None else f"all that {method} takes"
        self._before: tuple[GraftError, ...] = ()
        self._remarks: tuple[str, ...] = ()
        self._match()

    # --- narrowing -----------------------------------------------------------------------------------------

    def role(self, *roles: str) -> Selection:
        """The places with any of these roles; braces are allowed: ``attn.{q,v}``.

        Raises:
            GraftError: GC012 for a role that does not exist, GC002 for what is not a role.
        """
        return self._narrowed("role", roles)

    def modules(self, *globs: str) -> Selection:
        """The places whose module path any of these globs matches: ``*``, ``**`` and ``{a,b}`` as in a target.

        Raises:
            GraftError: GC002 or GC009 for what is not a glob.
        """
        return self._narrowed("modules", globs)

    def regex(self, *patterns: str) -> Selection:
        """The places whose whole module path any of these regular expressions matches.

        Raises:
            GraftError: GC002 or GC009 for what is not a regular expression, GC008 for one that takes too long.
        """
        return self._narrowed("regex", patterns)

    def layers(self, *layers: int | str) -> Selection:
        """The places in these layers of each stack: indices and slices such as ``"0:6"``, negative ones from the end.

        Raises:
            GraftError: GC002 for what is neither a layer nor a slice.
        """
        return self._narrowed("layers", layers)

    def exclude(self, *globs: str) -> Selection:
        """The places whose module path none of these globs matches.

        Raises:
            GraftError: GC002 or GC009 for what is not a glob.
        """
        return self._narrowed("exclude", globs)

    def _narrowed(self, name: str, values: Sequence[Any]) -> Selection:
        given = tuple(v for value in values for v in (as_items(value) if isinstance(value, list | tuple) else (value,)))
        if not given:
            raise GraftError("GC002", f"{name}() names nothing", hint=f"give what {name} of a target takes")
        items: Any = given[0] if len(given) == 1 else given
        held = None if self._written is None else getattr(self._written, name)
        if self._written is None or (held is not None and name != "exclude"):
            made = self._like(Target(**{name: items}))
            made._within, made._said, made._before = self._keys, self._expression, self._faults
            made._match()
            return made
        fields: dict[str, Any] = {f: getattr(self._written, f) for f in self._written.model_fields_set}
        if held is not None:
            items = (*as_items(held), *given)
        made = self._like(Target(**{**fields, name: items}))
        made._match()
        return made

    # --- combining -----------------------------------------------------------------------------------------

    def __or__(self, other: object) -> Selection:
        return self._combined("|", other, lambda a, b: a | b)

    def __and__(self, other: object) -> Selection:
        return self._combined("&", other, lambda a, b: a & b)

    def __sub__(self, other: object) -> Selection:
        return self._combined("-", other, lambda a, b: a - b)

    def _combined(self, sign: str, other: object, combine: Any) -> Selection:
        if not isinstance(other, Selection):
            return NotImplemented  # type: ignore[no-any-return]
        if not self._same_model(other):
            message = f"one selection is of {self._places.model}, the other of {other._places.model} with other places"
            raise GraftError("GC073", message, hint="select both in the same model")
        made = self._like(None)
        made._within, made._found = None, Meant()
        made._said = f"({self._expression}) {sign} ({other._expression})"
        made._keys = combine(self._keys, other._keys)
        made._before = tuple(dict.fromkeys((*self._faults, *other._faults)))
        made._method = self._method if self._method == other._method else None
        made._remarks = tuple(dict.fromkeys((*self._remarks, *other._remarks, *self._fused_with(other))))
        return made

    def _fused_with(self, other: Selection) -> list[str]:
        """Says that rows of a fused weight and the whole weight are two places, where each selection has one."""
        for one, two in ((self, other), (other, self)):
            whole = {c.module for c in two._chosen if not c.part and c.kind in _WEIGHTS}
            part = next((c for c in one._chosen if c.part and c.module in whole), None)
            if part is not None:
                names = f"{one_line(part.name)} and {one_line(part.module)}"
                return [f"note: {names} are two places, rows of a weight and the whole; name a role on both sides"]
        return []

    @property
    def _chosen(self) -> list[Candidate]:
        return [c for c in self._places.candidates if c.key in self._keys]

    def _same_model(self, other: Selection) -> bool:
        return self._places is other._places or self._places.candidates == other._places.candidates

    def _like(self, written: Target | None) -> Selection:
        """A copy with other fields, not matched yet."""
        made = object.__new__(type(self))
        for name in self.__slots__:
            setattr(made, name, getattr(self, name))
        made._written = written
        return made

    def _match(self) -> None:
        assert self._written is not None
        self._found = self._meant(self._written)
        self._keys = frozenset(c.key for c in self._found.chosen)

    @property
    def _faults(self) -> tuple[GraftError, ...]:
        """What is wrong with any pattern it was made with."""
        return (*self._before, *self._found.faults)

    @property
    def _notes(self) -> tuple[GraftError, ...]:
        return (*self._faults, *self._found.gaps)

    def _meant(self, target: Target) -> Meant:
        kinds, method = self._kinds, self._method or _NO_ROLE
        if self._within is not None:
            kinds = None
        elif kinds is None and target.role is None:
            kinds = _WEIGHTS
        candidates, missing = self._places.candidates, self._places.missing
        return meant(target, candidates, _WHERE, kinds=kinds, method=method, missing=missing, within=self._within)

    # --- counting ------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[SelectedPlace]:
        return (self._places.places[c.key] for c in self._chosen)

    def __contains__(self, place: object) -> bool:
        """Whether a place, or any place of a module path, is selected."""
        return any(place in (own, own.module, own.name) for own in self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Selection) and self._keys == other._keys and self._same_model(other)

    def __hash__(self) -> int:
        return hash(self._keys)

    @property
    def parameters(self) -> int:
        """Elements of all tensors in it; those that several places share, as tied ones, count once."""
        return sum({(place.tensors, place.rows): place.parameters for place in self}.values())

    def expect(self, count: int) -> Selection:
        """The same selection, if it has so many places.

        Args:
            count: from 0.

        Raises:
            GraftError: GC013 where it has another number, with the count of each pattern and what came closest; GC073
                for what is not a number.
        """
        count = _count(count)
        if len(self) == count:
            return self
        message = f"the selection has {counted(len(self))}, expected {count}"
        details: list[str | GraftError] = [error.message for error in self._notes]
        if self._written is not None and count:
            found = self._meant(self._written.model_copy(update={"expect": count})).faults
            details[:0] = [detail for error in found if error.code == "GC013" for detail in error.details]
        raise GraftError("GC013", message, place=Place(path=f"{_WHERE}.expect"), details=list(dict.fromkeys(details)))

    def to_target(self, method: str | None = None) -> Target:
        """A target that selects exactly these places in this model. It is checked by resolving it, and says how many
        they are (``expect``), so that a method or a model for which it would mean others is an error.

        The fields are those of the calls that made the selection. Those of a combined one are chosen: roles, roles in
        layers, or a list of modules.

        Args:
            method: the method that the target is for; by default that of `graftc.select`, or whichever takes such
                sites.

        Raises:
            GraftError: GC014 for an empty selection; GC011, GC014 or GC015 for a pattern that matches nothing; GC016
                for sites that the method does not take; GC017 and GC023 for a place that no method can adapt; GC093
                where no target selects exactly these.
        """
        if self._faults:
            raise copy.copy(self._faults[0])
        written = self._written if self._within is None else None
        return exact_target(self._places, self._keys, written, method or self._method)

    # --- looking -------------------------------------------------------------------------------------------

    @property
    def _expression(self) -> str:
        """How it was made, in the fields of a target."""
        own = []
        for name in Target.model_fields:
            value = None if self._written is None else getattr(self._written, name)
            own += [f"{name}: {write_items(value)}"] if value is not None else []
        fields = ", ".join(own)
        return f"({self._said}) & {fields}" if self._said and own else self._said or fields or "all"

    @property
    def _title(self) -> str:
        whose = f"{counted(len(self))} of {self._places.model}"
        return f"{whose}, {self.parameters:,} parameters: {one_line(self._expression, 400)}"

    def rows(self) -> list[tuple[str, ...]]:
        """Lines of a table: role, place, rows, layers, kind, shape, parameters and evidence. Equal layers of a stack
        share a line, with the parameters of all and the evidence of the first."""
        groups: dict[tuple[str, ...], list[SelectedPlace]] = {}
        for place in self:
            shape = " x ".join(map(str, place.shape))
            key = (", ".join(place.roles), place.starred, place.rows_text, str(place.kind), shape)
            groups.setdefault(key, []).append(place)
        made: list[tuple[str, ...]] = []
        for (role, starred, rows, kind, shape), found in groups.items():
            layers = format_layers(p.layer for p in found if p.layer is not None)
            count = f"{sum(p.parameters for p in found):,}"
            made.append((role, starred, rows, layers, kind, shape, count, found[0].evidence))
        return made

    def notes(self) -> list[str]:
        """What matched nothing, with what came closest, and layers that lack a role."""
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
        """Plain values: the model's class, how the selection was made, its places, and what matched nothing."""
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


def _count(value: Any) -> int:
    """A number of sites (GC073)."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    shown = value if isinstance(value, int) and not isinstance(value, bool) else kind_of(value)
    raise GraftError("GC073", f"the number of sites is {shown}", hint="give a whole number from 0")
