"""Overrides: other values for some sites of an adaptation, and the check that each override is used."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Self

from pydantic import Field, model_validator

from graftc.specs.base_model import SpecModel
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.errors.text import counted
from graftc.specs.limits import SIZE
from graftc.specs.patterns import (
    as_items,
    branches,
    expand_braces,
    glob_to_regex,
    layer_indices,
    measure_braces,
    suggest,
)
from graftc.specs.schema import needs_one_of
from graftc.specs.spec_errors import refuse
from graftc.specs.target import Candidate, Layers, Patterns, Roles


class Override(SpecModel):
    """Other values for some of an adaptation's sites.

    A subclass lists the fields that may change, each ``| None`` with default None, which keeps the
    adaptation's value. The selection works as in a target, on the sites that the target selected.
    """

    role: Roles | None = None
    """A role or a list of them."""

    modules: Patterns | None = None
    """Globs of module paths, or of a parameter's path where a module has several, as experts do."""

    layers: Layers | None = None
    """Layers of each stack: an index, a slice `"0:6"` or a list of them."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.role is None and self.modules is None and self.layers is None:
            refuse((), "an override needs role, modules or layers")
        if not self.changes():
            fields = self._changeable()
            refuse((), "an override changes nothing", hint=f"it may set: {', '.join(fields)}" if fields else None)
        return self

    @classmethod
    def _conditions(cls) -> list[dict[str, Any]]:
        return [needs_one_of(fields) for fields in (("role", "modules", "layers"), cls._changeable()) if fields]

    @classmethod
    def _changeable(cls) -> list[str]:
        """Return the fields that an override can change."""
        return [f for f in cls.model_fields if f not in Override.model_fields]

    @property
    def size(self) -> int:
        """The number of characters in its patterns, with braces expanded."""
        return sum(measure_braces(p)[1] for f in (self.role, self.modules) for p in as_items(f))

    def changes(self) -> dict[str, Any]:
        """Return the values that this override sets, by field."""
        return {name: value for name in self._changeable() if (value := getattr(self, name)) is not None}

    def matches(
        self,
        module: str,
        roles: Collection[str],
        layer: int | None,
        depth: int | None = None,
        *,
        parameter: str = "",
    ) -> bool:
        """Return whether the override applies to a site. Arguments are as in :meth:`MethodSpec.for_site`."""
        if self.role is not None and not any(b in roles for r in as_items(self.role) for b in expand_braces(r)):
            return False
        paths = (module, f"{module}.{parameter}") if parameter else (module,)
        fits = (glob_to_regex(g).fullmatch(path) for g in as_items(self.modules) for path in paths)
        if self.modules is not None and not any(fits):
            return False
        if self.layers is None:
            return True
        size = depth if depth is not None else (layer or 0) + 1
        return layer is not None and any(layer in layer_indices(e, size) for e in as_items(self.layers))


class RankOverride(Override):
    """Another rank or scaling for some of an adaptation's sites; omitted fields keep the adaptation's value."""

    rank: int | None = Field(default=None, ge=1, le=SIZE)
    """Rank at these sites."""

    alpha: float | None = Field(default=None, gt=0)
    """Numerator of the scaling at these sites."""


def check_used(overrides: Sequence[Override], sites: Sequence[Candidate], depth: Mapping[str, int], where: str) -> None:
    """Check that every override, and every pattern in it, matches a site, and is not shadowed.

    Args:
        overrides: the overrides in order; the first that matches a site applies.
        sites: the sites of the adaptation.
        depth: the number of layers of each stack.
        where: path of the overrides in the spec, for errors: ``adapt[0].overrides``.

    Raises:
        GraftError: GC011 with the override, or with its pattern that matches nothing.
    """
    taken: set[int] = set()
    for index, override in enumerate(overrides):
        path = f"{where}[{index}]"
        _check_parts(override, sites, depth, path)
        hits = _hits(override, sites, depth)
        if hits <= taken:
            message = "the override is never used: earlier ones match all of its sites"
            hint = "the first override that matches a site applies: put narrow ones first"
            raise GraftError("GC011", message, place=Place(path=path), hint=hint)
        taken |= hits


def _hits(override: Override, sites: Sequence[Candidate], depth: Mapping[str, int]) -> set[int]:
    return {
        number
        for number, site in enumerate(sites)
        if override.matches(site.module, site.roles, site.layer, depth.get(site.stack), parameter=site.parameter)
    }


def _check_parts(override: Override, sites: Sequence[Candidate], depth: Mapping[str, int], path: str) -> None:
    for field in ("role", "modules", "layers"):
        for spot, item, branch in branches(getattr(override, field), f"{path}.{field}", braces=field != "layers"):
            if not _hits(override.model_copy(update={field: branch}), sites, depth):
                shown = f"'{branch}'" if branch == item else f"'{branch}' of '{item}'"
                modules = [site.module for site in sites] if field == "modules" else []
                hint, fix = suggest(branch, item, modules) if modules else (None, None)
                message = f"the override matches none of the {counted(len(sites))} selected: {field} {shown}"
                raise GraftError("GC011", message, place=Place(path=spot), hint=hint, fix=fix)
