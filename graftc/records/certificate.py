"""Certificates: evidence that a fold computes the same function, independent of the fold's own formula.

Numeric: at each site, the *unfolded subgraph* between a linear map's input and its output runs in float64 on random
probes and is compared with the folded tensors (`graftc.compiler.folding.certify`); then the outputs of the whole model
are compared in its own dtype, or in float64 if it amplifies its own rounding beyond the budget.
Structural: the folded graph's hash equals the base's, up to declared additions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Ge

from graftc.records.anchor import AnchorRecord
from graftc.records.fields import AdaptationName, BaseFingerprint, SiteName
from graftc.records.retention import Retention
from graftc.specs.errors.markup import Html, bullets, folded, table, tag
from graftc.specs.errors.text import counted
from graftc.specs.records.record import OrNull, Record, stated

ALGEBRA_BOUND = 1e-9
"""Largest relative difference of float64 results; sums of some thousand float64 products stay far below."""

ROUNDING_BOUND = 0.5
"""Largest distance of a folded element from its float64 value, in units in the last place: rounding to nearest."""


@dataclass(frozen=True)
class SiteEvidence(Record):
    """The findings of probing at one site."""

    site: str
    """The site, or the tensor's name."""

    adaptations: tuple[str, ...]
    """Names of the adaptations that fold there."""

    change: Annotated[float, Ge(0)]
    """Largest change of the site's output by the adaptations, and of stored values by a trained copy: 0 would make the
    comparison vacuous."""

    algebra: Annotated[float, Ge(0)]
    """Largest difference of unfolded and folded output in float64, over the largest output."""

    rounding: Annotated[float, Ge(0)]
    """Largest distance of a folded element from its float64 value, in units in the last place."""

    retention: Annotated[Retention, OrNull()] = field(default_factory=Retention)
    """The part of the update there that rounding left; null where the update is zero."""

    def __post_init__(self) -> None:
        _replace_null(self, retention=Retention())
        super().__post_init__()

    @property
    def finite(self) -> bool:
        """Whether the evidence consists of finite numbers."""
        return math.isfinite(self.algebra) and math.isfinite(self.rounding)

    @property
    def passed(self) -> bool:
        """Whether the algebra holds and rounding was to nearest."""
        return self.algebra <= ALGEBRA_BOUND and self.rounding <= ROUNDING_BOUND + 1e-7

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return _without_retention(super().to_json(), self.retention)


@dataclass(frozen=True)
class CollapseEvidence(Record):
    """How far an adaptation's deployed form is from what it was in training, at one site."""

    adaptation: AdaptationName

    site: SiteName

    routings: Annotated[int, Ge(1)]
    """How many ways there are to draw its routes; all were run."""

    error: Annotated[float, Ge(0)]
    """Largest difference in float64 between the mean of all of them and the deployed form, over the largest change that
    this makes."""


@dataclass(frozen=True)
class PackingEvidence(Record):
    """The effect of packing a folded weight again, at one site."""

    site: SiteName

    tensor: str
    """The weight."""

    packing: str
    """Its packing, such as `nf4 group=64`."""

    error: Annotated[float, Ge(0)]
    """Root of the mean square of the error over that of the folded values, of the site's rows."""

    largest: Annotated[float, Ge(0)]
    """The largest error over the largest absolute folded value, of the site's rows."""

    rows: Annotated[int, Ge(0)]
    """How many rows of the whole weight the fold does not change."""

    disturbed: Annotated[int, Ge(0)]
    """In how many of these packing changes a value."""


@dataclass(frozen=True)
class RouteEvidence(Record):
    """How often a folded model would have chosen differently at one place, such as a router."""

    choice: str
    """The node of the base's graph that chooses."""

    module: str
    """The module that it is in."""

    choices: Annotated[int, Ge(0)]
    """How many choices were compared: one for each token, for example."""

    flips: Annotated[int, Ge(0)] = 0
    """How many of them differed."""

    gap: Annotated[float | None, Ge(0)] = 0.0
    """The largest difference between scores that were swapped; null where their numbers differ."""

    noise: Annotated[float, Ge(0)] = 0.0
    """How far scores move by rounding."""

    bound: Annotated[float, Ge(0)] = 0.0
    """The largest `gap` that is allowed."""

    @property
    def distance(self) -> float:
        """`gap`, and infinite where the numbers of scores differ."""
        return math.inf if self.gap is None else self.gap

    @stated
    def passed(self) -> bool:
        """Whether rounding explains the choices that were others."""
        return not self.flips or self.distance <= self.bound

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {**super().to_json(), "gap": self.gap if math.isfinite(self.distance) else None}

    def failure(self) -> str:
        """Return the reason why it did not pass, as a readable message."""
        return (
            f"{self.module or 'the model'} chose differently in {self.flips} of {self.choices} cases ({self.choice}), "
            f"between scores up to {self.distance:.2e} apart; rounding explains at most {self.bound:.2e}"
        )


def routed(routes: Sequence[RouteEvidence]) -> list[str]:
    """Return a readable line on how often the folded model's routers chose differently; no line if they never did."""
    other = [route for route in routes if route.flips]
    if not other:
        return []
    flips, choices = (sum(getattr(route, name) for route in routes) for name in ("flips", "choices"))
    worst = max(other, key=lambda route: route.distance / route.bound if route.bound else route.distance)
    return [
        f"the routers chose differently in {flips} of {choices} cases, between scores at most {worst.distance:.1e} "
        f"apart in {worst.module or worst.choice}, where rounding explains up to {worst.bound:.1e}; outputs were "
        "compared with the same choices imposed on both models"
    ]


@dataclass(frozen=True)
class Certificate(Record, behind={"": ("passed",)}):
    """The evidence for a fold."""

    sites: tuple[SiteEvidence, ...]
    """Evidence for each site."""

    outputs: Mapping[str, Annotated[float, Ge(0)]]
    """Largest absolute difference of each output, folded against unfolded, in the model's dtype, or in float64 where
    `notes` says so; none where the whole model was not run."""

    budget: Annotated[float, Ge(0), OrNull()]
    """The largest difference of outputs that is allowed; null where none were compared."""

    structure: str
    """Hash of the folded graph."""

    base_structure: str
    """Hash of the base's graph; the two are equal where folding left nothing behind."""

    additions: tuple[str, ...] = ()
    """Biases that folding had to add."""

    fingerprint: BaseFingerprint = ""

    dtype: str = ""
    """The model's dtype, such as `float32`."""

    notes: tuple[str, ...] = ()
    """Further facts, for people."""

    collapses: tuple[CollapseEvidence, ...] = ()
    """Evidence of adaptations that draw while training and are deployed as their mean, folded or not; nothing is held
    against it."""

    anchors: tuple[AnchorRecord, ...] = ()
    """The base's graphs held against the source model itself, in each mode."""

    requantised: tuple[PackingEvidence, ...] = ()
    """The effect of packing folded weights again; empty where none was."""

    routes: tuple[RouteEvidence, ...] = ()
    """How often the folded model would have chosen differently, at each place where it chooses among its own values.
    Outputs are compared with the unfolded model's choices imposed on both."""

    retention: Annotated[Retention, OrNull()] = field(default_factory=Retention)
    """The part of all sites' updates that rounding left; null where all are zero. Nothing is held against it."""

    def __post_init__(self) -> None:
        _replace_null(self, retention=Retention(), budget=0.0)
        super().__post_init__()

    @stated
    def unchanged(self) -> tuple[str, ...]:
        """Sites at which every folded element is the base's."""
        return tuple(dict.fromkeys(site.site for site in self.sites if site.retention.unchanged))

    @stated
    def largest_difference(self) -> Annotated[float, Ge(0), OrNull()]:
        """The largest of `outputs`; null where none were compared."""
        return max(self.outputs.values(), default=0.0)

    @property
    def folded(self) -> tuple[str, ...]:
        """Names of the adaptations that fold, or whose deployed form is a mean."""
        every = (name for site in self.sites for name in site.adaptations)
        return tuple(dict.fromkeys([*every, *(item.adaptation for item in self.collapses)]))

    @property
    def finite(self) -> bool:
        """Whether all the numbers to compare are finite; they are not if a model returns NaN."""
        return all(map(math.isfinite, (*self.outputs.values(), self.budget))) and all(s.finite for s in self.sites)

    @stated
    def passed(self) -> bool:
        """Whether all of it holds."""
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
        """Return HTML for notebooks: the result, why it failed if so, the outputs, and the evidence for each site.

        The evidence is in a section that is collapsed by default.
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
        """Return plain data."""
        data = _without_retention(super().to_json(), self.retention)
        return data if self.outputs else {**data, "budget": None, "largest_difference": None}


def _replace_null(record: Record, **values: Any) -> None:
    """Set fields that were null in JSON to what they stand for."""
    for name, value in values.items():
        if getattr(record, name) is None:
            object.__setattr__(record, name, value)


def _without_retention(data: dict[str, Any], retention: Retention) -> dict[str, Any]:
    """Return data that are written with null for the retention of nothing."""
    return data if retention.wanted else {**data, "retention": None}


def require_consistent(certificate: Certificate, data: Mapping[str, Any]) -> None:
    """Check that the stated result follows from the evidence.

    Raises:
        ValueError: if the result is missing or different.
    """
    if data.get("passed") is not certificate.passed:
        raise ValueError("'passed' does not follow from the evidence")
