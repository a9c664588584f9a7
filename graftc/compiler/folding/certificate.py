"""Certificates: evidence that a fold computes the same function, from something other than the fold's own formula.

Numeric: the *unfolded subgraph* between a linear map's input and its output, run in float64 on random probes, against
the folded tensors, per site (`graftc.compiler.folding.certify`); then the outputs of the whole model in its
own dtype.
Structural: the folded graph's hash equals the base's, up to declared additions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from graftc.compiler.capture.anchor import Anchor
from graftc.compiler.folding.retention import Retention
from graftc.compiler.folding.route_evidence import RouteEvidence, routed
from graftc.specs.errors.diagnostics import GraftError, warn
from graftc.specs.errors.markup import Html, bullets, folded, table, tag
from graftc.specs.errors.text import counted

ALGEBRA_BOUND = 1e-9
"""Largest relative difference of float64 results; sums of some thousand float64 products stay far below."""

ROUNDING_BOUND = 0.5
"""Largest distance of a folded element from its float64 value, in units in the last place: rounding to nearest."""

DEFAULT_BUDGET: Mapping[torch.dtype, float] = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
"""Largest difference of outputs by dtype, relative to the largest output or 1."""


HALF = 0.5
"""What is left of the norm of an update below which a merge warns."""

_WIDER = "dtype=torch.float32 (--dtype float32) keeps it"


@dataclass(frozen=True)
class SiteEvidence:
    """What probing showed at one site.

    Attributes:
        site: the SiteKey, or the tensor's name.
        adaptations: what folds there.
        change: largest change of the output by the adaptation, so that a vacuous check shows.
        algebra: difference of unfolded and folded output in float64, before rounding, over the largest output.
        rounding: largest distance of a folded element from its float64 value, in units in the last place.
        retention: how much of the update rounding left.
    """

    site: str
    adaptations: tuple[str, ...]
    change: float
    algebra: float
    rounding: float
    retention: Retention

    @property
    def finite(self) -> bool:
        """Whether the evidence is of numbers."""
        return math.isfinite(self.algebra) and math.isfinite(self.rounding)

    @property
    def passed(self) -> bool:
        """The algebra holds and rounding was to nearest."""
        return self.algebra <= ALGEBRA_BOUND and self.rounding <= ROUNDING_BOUND + 1e-7

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON data."""
        return {**asdict(self), "adaptations": list(self.adaptations), "retention": self.retention.to_json()}


@dataclass(frozen=True)
class CollapseEvidence:
    """How far an adaptation's deployed form is from what it was in training, at one site.

    Attributes:
        adaptation, site: whose, and where.
        routings: how many ways there are to draw its routes; all were run.
        error: largest difference, on random probes in float64, between the mean of all of them and the deployed form,
            over the largest change that this makes. Within rounding where the two are the same function.
    """

    adaptation: str
    site: str
    routings: int
    error: float


@dataclass(frozen=True)
class PackingEvidence:
    """What packing a folded weight again does to it, at one site.

    Attributes:
        site: where, as text.
        tensor: the weight, of which the site's rows may be a part.
        packing: its packing, as text.
        error: root of the mean square of the error over that of the folded values, of the site's rows.
        largest: the largest error over the largest absolute folded value, of the site's rows.
        rows: how many rows of the whole weight the fold does not change.
        disturbed: in how many of these packing changes a value.
    """

    site: str
    tensor: str
    packing: str
    error: float
    largest: float
    rows: int
    disturbed: int


@dataclass(frozen=True)
class Certificate:
    """The evidence for one fold.

    Attributes:
        sites: evidence per site.
        outputs: largest absolute difference of each output, folded against unfolded, in the model's dtype; none where
            the whole model was not run. Where the model routes, both sides take the unfolded one's routes.
        budget: what `outputs` may differ by.
        structure: hash of the folded graph.
        base_structure: hash of the base's graph.
        additions: biases that folding had to add.
        fingerprint: of the base.
        collapses: what was drawn while training and is deployed as its mean, folded or not. Nothing is held against it.
        anchors: how the base's graphs compare with the source model itself; without that, no graph is used.
        retention: how much of the updates of all sites rounding left, and packing again where that was asked for.
            Nothing is held against it.
        requantised: what packing folded weights again did to them.
        routes: for each place where the model chooses among its own values, as routers do, how often the folded model
            would have chosen differently, and whether rounding explains it.
    """

    sites: tuple[SiteEvidence, ...]
    outputs: Mapping[str, float]
    budget: float
    structure: str
    base_structure: str
    additions: tuple[str, ...] = ()
    fingerprint: str = ""
    dtype: str = ""
    notes: tuple[str, ...] = field(default_factory=tuple)
    collapses: tuple[CollapseEvidence, ...] = ()
    anchors: tuple[Anchor, ...] = ()
    retention: Retention = field(default_factory=Retention)
    requantised: tuple[PackingEvidence, ...] = ()
    routes: tuple[RouteEvidence, ...] = ()

    @property
    def unchanged(self) -> tuple[str, ...]:
        """Sites at which every folded element is the base's."""
        return tuple(dict.fromkeys(site.site for site in self.sites if site.retention.unchanged))

    @property
    def largest_difference(self) -> float:
        """The largest difference of any output."""
        return max(self.outputs.values(), default=0.0)

    @property
    def finite(self) -> bool:
        """Whether there are numbers to hold against one another; where a model gives NaN, there are none."""
        return all(map(math.isfinite, (*self.outputs.values(), self.budget))) and all(s.finite for s in self.sites)

    @property
    def passed(self) -> bool:
        """Every site's evidence holds, outputs keep to the budget, rounding explains where routers chose differently,
        and the structure is the base's."""
        within = all(value <= self.budget for value in self.outputs.values()) and all(r.passed for r in self.routes)
        same = self.structure == self.base_structure
        return bool(self.sites or self.collapses) and within and same and all(site.passed for site in self.sites)

    @property
    def summary(self) -> str:
        """Whether it passed, and by how much, in a line."""
        algebra = max((site.algebra for site in self.sites), default=0.0)
        graph = "the" if self.structure == self.base_structure else "not the"
        outputs = (
            f"outputs within {self.largest_difference:.1e} (budget {self.budget:.1e}), {graph} base's graph"
            if self.outputs
            else "every entry rounded to nearest; no outputs were compared"
        )
        state = "passed" if self.passed else "NOT PASSED"
        return f"{state}: {counted(len(self.sites))} within {algebra:.1e} in float64, {outputs}"

    def __str__(self) -> str:
        """The summary, and why it did not pass; ``repr`` and `to_json` have everything."""
        return "\n".join(("certificate " + self.summary, *(f"  {line}" for line in self.failures())))

    def failures(self) -> list[str]:
        """Why it did not pass, for people."""
        reasons = [
            f"{s.site}: algebra {s.algebra:.2e} (at most {ALGEBRA_BOUND:.0e}), "
            f"rounding {s.rounding:.3f} ulp (at most {ROUNDING_BOUND})"
            if s.finite
            else f"{s.site}: what folds there is not finite"
            for s in self.sites
            if not s.passed
        ]
        reasons += [
            f"output {name} differs by {value:.3e}, the budget is {self.budget:.3e}"
            if math.isfinite(value)
            else f"output {name} is not finite, or only one of the two is"
            for name, value in self.outputs.items()
            if not value <= self.budget
        ]
        reasons += [route.failure() for route in self.routes if not route.passed]
        if self.structure != self.base_structure:
            reasons.append("the folded graph is not the base's graph")
        return reasons or ([] if self.sites or self.collapses else ["nothing was folded"])

    def _repr_html_(self) -> str:
        """For notebooks: whether it passed and why not, the outputs, and the evidence of each site, folded."""
        state = f"Certificate: {'passed' if self.passed else 'not passed'}"
        outputs = [(name, f"{value:.3e}", f"{self.budget:.3e}") for name, value in self.outputs.items()]
        sites = [
            (s.site, ", ".join(s.adaptations), *(f"{n:.2e}" for n in (s.change, s.algebra, s.rounding)))
            for s in self.sites
        ]
        headings = ("site", "adaptations", "change", "algebra", "rounding")
        where = counted(len(self.sites))
        notes = [*self.notes, *(f"added: {name}" for name in self.additions)]
        parts = [
            tag("b", state),
            Html() if self.passed else bullets(self.failures()),
            table(("output", "difference", "budget"), outputs, ("difference", "budget")),
            bullets([*notes, *routed(self.routes)]),
            folded(where, table(headings, sites, headings[2:])),
        ]
        return Html("".join(parts))

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON data."""
        return {
            "passed": self.passed,
            **asdict(self),
            "sites": [site.to_json() for site in self.sites],
            "retention": self.retention.to_json(),
            "unchanged": list(self.unchanged),
            "outputs": dict(self.outputs),
            "budget": self.budget if self.outputs else None,
            "additions": list(self.additions),
            "notes": list(self.notes),
            "collapses": [asdict(item) for item in self.collapses],
            "anchors": [item.to_json() for item in self.anchors],
            "requantised": [asdict(item) for item in self.requantised],
            "routes": [item.to_json() for item in self.routes],
            "largest_difference": self.largest_difference if self.outputs else None,
        }


def require_changed(certificate: Certificate, allow_unchanged: bool = False) -> None:
    """Refuse a fold after which every folded tensor is the base's, unless that is allowed, and warn (GC105) where
    rounding has lost more than half of the update.

    Raises:
        GraftError: GC104 with the reason.
    """
    retention, to, wider = certificate.retention, f"rounding to {certificate.dtype}", _WIDER
    if not certificate.sites:
        return
    if certificate.requantised:
        kinds = ", ".join(dict.fromkeys(item.packing.partition(" ")[0] for item in certificate.requantised))
        to, wider = f"packing as {kinds}", 'base="full" (--base full) keeps it'
    if retention.unchanged and not allow_unchanged:
        sites = len(dict.fromkeys(site.site for site in certificate.sites))
        where = "the only site" if sites == 1 else f"all {sites} sites"
        if retention.wanted:
            message = f"the merge changes nothing: at {where} the update is lost in {to}"
            hint = f"{wider}; allow_unchanged=True (--allow-unchanged) merges all the same"
        else:
            message = f"the merge changes nothing: the update is zero at {where}"
            hint = (
                "train first, or load the tensors that were trained, and look at alpha; allow_unchanged=True "
                "(--allow-unchanged) merges all the same"
            )
        raise GraftError("GC104", message, hint=hint)
    if retention.norm < HALF and not retention.unchanged:
        message = f"{to} leaves {retention.norm:.1%} of the update"
        warn("GC105", message, hint=wider)
