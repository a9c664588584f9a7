"""Certificates: evidence that a fold computes the same function, independent of the fold's own formula.

Numeric: at each site, the *unfolded subgraph* between a linear map's input and its output runs in float64 on random
probes and is compared with the folded tensors (`graftc.compiler.folding.certify`); then the outputs of the whole model
are compared in its own dtype.
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
    """The results of probing one site.

    Attributes:
        site: the SiteKey, or the name of the tensor.
        adaptations: names of the adaptations that fold there.
        change: the largest change of the output by the adaptation, which reveals a vacuous check.
        algebra: the difference of unfolded and folded output in float64, before rounding, relative to the largest
            output.
        rounding: the largest distance of a folded element from its float64 value, in units in the last place.
        retention: how much of the update is left after rounding.
    """

    site: str
    adaptations: tuple[str, ...]
    change: float
    algebra: float
    rounding: float
    retention: Retention

    @property
    def finite(self) -> bool:
        """Whether the evidence consists of finite numbers."""
        return math.isfinite(self.algebra) and math.isfinite(self.rounding)

    @property
    def passed(self) -> bool:
        """Whether the algebra holds and rounding was to nearest."""
        return self.algebra <= ALGEBRA_BOUND and self.rounding <= ROUNDING_BOUND + 1e-7

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON data."""
        return {**asdict(self), "adaptations": list(self.adaptations), "retention": self.retention.to_json()}


@dataclass(frozen=True)
class CollapseEvidence:
    """The distance between an adaptation's deployed form and its form in training, at one site.

    Attributes:
        adaptation, site: the names of the adaptation and of the site.
        routings: the number of ways to draw its routes; all of them were run.
        error: the largest difference, on random probes in float64, between the mean of all of them and the deployed
            form, relative to the largest change that the deployed form makes. Within rounding if the two are the same
            function.
    """

    adaptation: str
    site: str
    routings: int
    error: float


@dataclass(frozen=True)
class PackingEvidence:
    """The effect of packing a folded weight again, at one site.

    Attributes:
        site: the site, as text.
        tensor: the name of the weight; the site's rows may be a part of it.
        packing: the packing of the weight, as text.
        error: the root mean square of the error relative to that of the folded values, over the site's rows.
        largest: the largest error relative to the largest absolute folded value, over the site's rows.
        rows: the number of rows of the whole weight that the fold does not change.
        disturbed: the number of these rows in which packing changes a value.
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
        sites: the evidence for each site.
        outputs: the largest absolute difference of each output, folded against unfolded, in the model's dtype; empty if
            the whole model was not run. If the model routes, both sides take the routes of the unfolded one.
        budget: the largest difference that `outputs` may contain.
        structure: the hash of the folded graph.
        base_structure: the hash of the base's graph.
        additions: the biases that folding had to add.
        fingerprint: the fingerprint of the base.
        collapses: evidence for what was drawn in training and is deployed as its mean, folded or not. No limit applies
            to it.
        anchors: comparisons of the base's graphs with the source model itself; without one, no graph is used.
        retention: how much of the updates of all sites is left after rounding, and after packing again if that was
            requested. No limit applies to it.
        requantised: the effect of packing folded weights again.
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
        """The sites at which every folded element equals the base's."""
        return tuple(dict.fromkeys(site.site for site in self.sites if site.retention.unchanged))

    @property
    def largest_difference(self) -> float:
        """The largest difference of any output."""
        return max(self.outputs.values(), default=0.0)

    @property
    def finite(self) -> bool:
        """Whether all the numbers to compare are finite; they are not if a model returns NaN."""
        return all(map(math.isfinite, (*self.outputs.values(), self.budget))) and all(s.finite for s in self.sites)

    @property
    def passed(self) -> bool:
        """Whether all of the evidence holds.

        That is so if every site's evidence holds, the outputs keep to the budget, rounding explains every different
        choice of a router, and the structure is the base's. There has to be at least one site or collapse.
        """
        within = all(value <= self.budget for value in self.outputs.values()) and all(r.passed for r in self.routes)
        same = self.structure == self.base_structure
        return bool(self.sites or self.collapses) and within and same and all(site.passed for site in self.sites)

    @property
    def summary(self) -> str:
        """A line that says whether the certificate passed, and by how much."""
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
        """Return the summary and the reasons why it did not pass; ``repr`` and `to_json` contain everything."""
        return "\n".join(("certificate " + self.summary, *(f"  {line}" for line in self.failures())))

    def failures(self) -> list[str]:
        """Return the reasons why the certificate did not pass, as readable messages."""
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
        """Return HTML for notebooks: the result and the reasons for a failure, the outputs, and the evidence of sites.

        The latter is in a section that is collapsed at first.
        """
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
        """Return everything as JSON data."""
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
    """Refuse a fold after which every folded tensor equals the base's, unless that is allowed.

    Warn (GC105) if rounding has lost more than half of the update.

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
