"""A model's selectable places as plain data, without graphs or tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import fx, nn

from graftc.compiler.resolve.sitetable import BlockedSite, SiteTable
from graftc.compiler.resolve.token_embeddings import token_embeddings
from graftc.compiler.roles.findings import Structure, reasons
from graftc.passes.core.ir.program import Program
from graftc.passes.core.sites.site_slices import slices_of
from graftc.passes.core.sites.sites import AttentionSite, LinearSite, NormSite, ParameterSite, Site, SublayerSite
from graftc.passes.core.weights.runs import Runs
from graftc.passes.core.weights.store import Store
from graftc.records.roles import Finding, Unresolved
from graftc.specs.claims import SiteKind
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.text import format_runs
from graftc.specs.roles import ROLES, parse_role
from graftc.specs.target import Candidate


@dataclass(frozen=True)
class SelectedPlace:
    """A place in a model that a target can select.

    Attributes:
        name: the module path, followed by the part of a fused weight, as in ``transformer.h.0.attn.c_attn[q]``, or by
            the parameter of experts.
        module: dotted path of its module.
        roles: its roles with all prefixes, as in ``decoder.cross.attn.k``; several for tied weights, none if only its
            name is known.
        kind: the kind of site.
        layer, stack: index of its layer and path of the list that contains the layer; outside layers, None and "".
        tensors: names of its weight and its bias; empty for attention layers, sublayers and values.
        rows: the output rows that it covers in the weight, as ascending half-open runs; None for all rows.
        shape: the shape of these rows as stored; empty if there is no weight.
        parameters: number of elements in its tensors, counting only these rows.
        uses: how many times the model uses it.
        evidence: the reason for its role.
        blocked: the reason why no method can adapt it; empty if one can.
        unused: whether it is blocked because no output needs it.
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
        """The first role; empty if there is none."""
        return self.roles[0] if self.roles else ""

    @property
    def starred(self) -> str:
        """The name with a star in place of the layer index, so that equal layers share one name."""
        number = f"{self.stack}.{self.layer}".lstrip(".")
        same = self.layer is not None and f"{self.name}.".startswith(f"{number}.")
        return f"{self.stack}.*".lstrip(".") + self.name[len(number) :] if same else self.name

    @property
    def rows_text(self) -> str:
        """The rows as text; empty if there is no weight."""
        return ("all" if self.rows is None else format_runs(self.rows)) if self.tensors else ""

    def to_json(self) -> dict[str, Any]:
        """Return the place as plain values."""
        rows = None if self.rows is None else [list(run) for run in self.rows]
        lists = {"roles": list(self.roles), "tensors": list(self.tensors), "shape": list(self.shape), "rows": rows}
        return {**asdict(self), "kind": str(self.kind), **lists}


@dataclass(frozen=True)
class Selectable:
    """The places of a model that targets select from.

    Attributes:
        model: name of the model's class.
        candidates: the places as the resolver sees them.
        places: the same places with their details, by key.
        unresolved: the parts of the model that have no role.
    """

    model: str
    candidates: tuple[Candidate, ...]
    places: Mapping[Any, SelectedPlace]
    unresolved: tuple[Unresolved, ...] = ()

    def missing(self, spot: tuple[str, int] | None) -> Sequence[str]:
        """Return the parts without a role, with reasons, of a layer (given by stack and index) or the whole model."""
        return reasons(self.unresolved, spot)

    def require_adaptable(self, place: SelectedPlace) -> None:
        """Raise GC017 or GC023, as compiling does, if no method can adapt a place."""
        if place.blocked:
            code = "GC023" if place.unused else "GC017"
            raise GraftError(code, f"{place.module} {place.blocked}", hint="leave it out with exclude")


@dataclass(frozen=True)
class ModelStructure(Structure):
    """The architecture of a model's usual graph, together with the model's places.

    Attributes:
        places: the places that targets select from.
    """

    places: Selectable = field(kw_only=True, repr=False, compare=False)


def selectable(model: nn.Module, program: Program, store: Store, structure: Structure) -> Selectable:
    """Return the places in a base model that targets can select.

    Args:
        model: the model that was captured.
        program: the captured graph.
        store: its tensors.
        structure: the roles found in that graph.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    table = SiteTable(program, store, structure, modules, token_embeddings(model, program))
    evidence: dict[fx.Node | str, list[Finding]] = defaultdict(list)
    for finding in structure.findings:
        evidence[finding.node].append(finding)
        if finding.kind == SiteKind.PARAMETER and finding.parameter is not None:
            evidence[finding.parameter].append(finding)
    places = {c.key: _place(c, table.entries[int(str(c.key))], store, evidence) for c in table.candidates}
    return Selectable(type(model).__name__, tuple(table.candidates), places, structure.unresolved)


def _place(
    candidate: Candidate, sites: Sequence[Site], store: Store, evidence: Mapping[fx.Node | str, Sequence[Finding]]
) -> SelectedPlace:
    first = sites[0]
    slices = slices_of(first, store)
    own = slices[0] if slices else None
    roles = tuple(dict.fromkeys(role for site in sites for role in site.roles))
    blocked = first if isinstance(first, BlockedSite) else None
    return SelectedPlace(
        f"{candidate.name}.{candidate.parameter}" if candidate.parameter else candidate.name,
        candidate.module,
        roles,
        candidate.kind,
        candidate.layer,
        candidate.stack,
        tuple(part.tensor for part in slices),
        own.rows if own else None,
        own.own_shape if own else (),
        sum(part.size for part in slices),
        len(sites),
        blocked.reason if blocked else _evidence(first, evidence),
        blocked.reason if blocked else "",
        blocked.unused if blocked else False,
    )


def _evidence(site: Site, evidence: Mapping[fx.Node | str, Sequence[Finding]]) -> str:
    """Return the reason for a site's first role, or the meaning of the role if nothing else is known."""
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
    findings = [f for f in evidence.get(at, ()) if f.role == site.roles[0]] if at is not None else []
    same = [f for f in findings if f.rows == rows] or findings
    if same:
        return same[0].evidence
    if isinstance(site, SublayerSite):
        return f"added to the residual stream at {site.sum.name}"
    return ROLES[parse_role(site.roles[0]).name].meaning
