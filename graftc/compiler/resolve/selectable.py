"""The places of a model as data: what targets select from, with what is known of each, and no graph or tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import fx, nn

from graftc.compiler.resolve.candidates import Candidate
from graftc.compiler.resolve.sitetable import BlockedSite, SiteTable
from graftc.compiler.resolve.token_embeddings import token_embeddings
from graftc.compiler.roles.findings import Finding, Structure, format_runs
from graftc.passes.core.ir.program import Program
from graftc.passes.core.sites.sites import AttentionSite, LinearSite, NormSite, ParameterSite, Site, SublayerSite
from graftc.passes.core.weights.runs import Runs
from graftc.passes.core.weights.store import Store
from graftc.specs.claims import SiteKind
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.roles import ROLES, parse_role

__all__ = ["ModelStructure", "Selectable", "SelectedPlace", "selectable"]


@dataclass(frozen=True)
class SelectedPlace:
    """One place of a model that a target can select.

    Attributes:
        name: the module path, with the part of a fused weight, as in ``transformer.h.0.attn.c_attn[q]``, or with the
            parameter of experts.
        module: dotted path of its module.
        roles: what it does, with all prefixes: ``decoder.cross.attn.k``; several for tied weights, none where only its
            name is known.
        kind: the kind of site.
        layer, stack: index of its layer and path of the list that this is in; None and empty outside of layers.
        tensors: names of its weight and its bias; empty for attentions, sublayers and values.
        rows: which output rows of the weight these are, as ascending half-open runs; None is all of them.
        shape: sizes of these rows as they are stored; empty where there is no weight.
        parameters: elements of its tensors, of these rows only.
        uses: how often the model computes with it.
        evidence: why it has its role.
        blocked: why no method can adapt it; empty for all others.
        unused: it is blocked because no output needs it.
    """

    name: str
    module: str
    roles: tuple[str, ...]
    kind: SiteKind
    layer: int | None
    stack: str
    tensors: tuple[str, ...]
    rows: Runs | None
    shape: tuple[int, ...]
    parameters: int
    uses: int
    evidence: str
    blocked: str = ""
    unused: bool = False

    @property
    def role(self) -> str:
        """The first role; empty where there is none."""
        return self.roles[0] if self.roles else ""

    @property
    def starred(self) -> str:
        """The name with a star for the layer: what equal layers have in common."""
        number = f"{self.stack}.{self.layer}".lstrip(".")
        same = self.layer is not None and f"{self.name}.".startswith(f"{number}.")
        return f"{self.stack}.*".lstrip(".") + self.name[len(number) :] if same else self.name

    @property
    def rows_text(self) -> str:
        """The rows as text; empty where there is no weight."""
        return ("all" if self.rows is None else format_runs(self.rows)) if self.tensors else ""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        rows = None if self.rows is None else [list(run) for run in self.rows]
        lists = {"roles": list(self.roles), "tensors": list(self.tensors), "shape": list(self.shape), "rows": rows}
        return {**asdict(self), "kind": str(self.kind), **lists}


@dataclass(frozen=True)
class Selectable:
    """The places of a model that targets select from.

    Attributes:
        model: class of the model.
        candidates: the places as the resolver sees them.
        places: the same with what is known of each, by key.
        unresolved: stack, layer and text of what has no role.
    """

    model: str
    candidates: tuple[Candidate, ...]
    places: Mapping[Any, SelectedPlace]
    unresolved: tuple[tuple[str, int | None, str], ...] = ()

    def missing(self, spot: tuple[str, int] | None) -> Sequence[str]:
        """What has no role in a layer, or in the whole model, and why: see `SiteTable.missing`."""
        return [text for stack, layer, text in self.unresolved if spot is None or (stack, layer) == spot]

    def require_adaptable(self, place: SelectedPlace) -> None:
        """Raise what compiling raises for a place that no method can adapt (GC017, GC023)."""
        if place.blocked:
            code = "GC023" if place.unused else "GC017"
            raise GraftError(code, f"{place.module} {place.blocked}", hint="leave it out with exclude")


@dataclass(frozen=True)
class ModelStructure(Structure):
    """The architecture of a model's usual graph, with its places.

    Attributes:
        places: what targets select from.
    """

    places: Selectable = field(kw_only=True, repr=False, compare=False)


def selectable(model: nn.Module, program: Program, store: Store, structure: Structure) -> Selectable:
    """The places of a base model.

    Args:
        model: the model that was captured.
        program: its graph as captured.
        store: its tensors.
        structure: the roles found in that graph.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    table = SiteTable(program, store, structure, modules, token_embeddings(model, program))
    evidence: dict[fx.Node | str, list[Finding]] = {}
    for finding in structure.findings:
        evidence.setdefault(finding.node, []).append(finding)
        if finding.kind == SiteKind.PARAMETER and finding.parameter is not None:
            evidence.setdefault(finding.parameter, []).append(finding)
    places = {c.key: _place(c, table.entries[int(str(c.key))], store, evidence) for c in table.candidates}
    rest = tuple((u.stack, u.layer, f"{u.module}: {u.reason}") for u in structure.unresolved)
    return Selectable(type(model).__name__, tuple(table.candidates), places, rest)


def _place(
    candidate: Candidate, sites: Sequence[Site], store: Store, evidence: Mapping[fx.Node | str, Sequence[Finding]]
) -> SelectedPlace:
    first = sites[0]
    tensors, rows, shape, count = _tensors(first, store)
    roles = tuple(dict.fromkeys(role for site in sites for role in site.roles))
    blocked = first if isinstance(first, BlockedSite) else None
    return SelectedPlace(
        f"{candidate.name}.{candidate.parameter}" if candidate.parameter else candidate.name,
        candidate.module,
        roles,
        candidate.kind,
        candidate.layer,
        candidate.stack,
        tensors,
        rows,
        shape,
        count,
        len(sites),
        blocked.reason if blocked else _evidence(first, evidence),
        blocked.reason if blocked else "",
        blocked.unused if blocked else False,
    )


def _tensors(site: Site, store: Store) -> tuple[tuple[str, ...], Runs | None, tuple[int, ...], int]:
    """Names of what is stored for a site, its rows and sizes, and how many elements it has."""
    if isinstance(site, LinearSite):
        count = sum(own.size for own in site.slices)
        return tuple(own.tensor for own in site.slices), site.own.rows, site.own.own_shape, count
    found: tuple[str | None, ...] = ()
    if isinstance(site, NormSite):
        found = (site.weight, site.bias)
    elif isinstance(site, ParameterSite):
        found = (site.tensor,)
    shapes = {name: tuple(store.get(name).shape) for name in found if name is not None}
    count = sum(map(math.prod, shapes.values()))
    return tuple(shapes), None, next(iter(shapes.values()), ()), count


def _evidence(site: Site, evidence: Mapping[fx.Node | str, Sequence[Finding]]) -> str:
    """Why a site has its first role; what the role means, where that is all there is to say."""
    if not site.roles:
        return ""
    at: fx.Node | str | None = None
    rows: Runs | None = None
    if isinstance(site, LinearSite):
        at, rows = site.use.node, site.own.rows
    elif isinstance(site, AttentionSite | NormSite):
        at = site.node
    elif isinstance(site, ParameterSite):
        at = site.tensor
    found = [f for f in evidence.get(at, ()) if f.role == site.roles[0]] if at is not None else []
    same = [f for f in found if f.rows == rows] or found
    if same:
        return same[0].evidence
    if isinstance(site, SublayerSite):
        return f"added to the residual stream at {site.sum.name}"
    return ROLES[parse_role(site.roles[0]).name].meaning
