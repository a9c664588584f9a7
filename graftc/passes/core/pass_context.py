"""The context of a plugin's pass, and the pass's results: facts for other passes, and figures for reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, nan
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar

from graftc.passes.core.ir.program import Program
from graftc.passes.core.pipeline import Pass
from graftc.passes.core.sites.sites import Site
from graftc.passes.core.weights.store import Store
from graftc.records.passes import PassFigure, PassRecord
from graftc.specs.document import Spec
from graftc.specs.errors.arguments import kind_of
from graftc.specs.errors.diagnostics import GraftError, nearest

if TYPE_CHECKING:
    from graftc.passes.core.build.builder import Builder

SITES, PLACES = "sites", "places"
"""The facts that `PassContext.sites` and `PassContext.adapted` require."""


@dataclass
class Findings:
    """The facts and figures that plugins' passes record while a pipeline runs.

    Attributes:
        facts: the values of facts, by name.
        figures: for every pass that ran, in order, its figures by name and site.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    figures: dict[Pass[Any], dict[tuple[str, str], PassFigure]] = field(default_factory=dict)

    def records(self, pipeline: str) -> tuple[PassRecord, ...]:
        """Return a record of each pass that ran."""
        ran = ((own, own.origin, tuple(entries.values())) for own, entries in self.figures.items())
        return tuple(
            PassRecord(pipeline, own.name, origin.distribution, origin.version, own.rewrites, figures)
            for own, origin, figures in ran
            if origin is not None
        )


class PassHost:
    """Base class of the contexts of pipelines that plugins can extend; it provides the data that their passes may use.

    Attributes:
        findings: the facts and figures that plugins' passes record.
        keeps_figures: whether the figures reported by the passes are used.
    """

    findings: Findings
    keeps_figures: ClassVar[bool] = True

    @property
    def store(self) -> Store | None:
        """The Store with the tensors to which Programs refer; None unless a subclass provides it."""
        return None

    @property
    def requested_spec(self) -> Spec:
        """The spec that the user requested."""
        raise NotImplementedError

    @property
    def every_site(self) -> Sequence[Site]:
        """All sites; empty if they are not known."""
        return ()

    @property
    def adapted_sites(self) -> Mapping[str, Sequence[Site]]:
        """The sites of each adaptation; empty if they are not known."""
        return {}

    def inserting(self, program: Program, owner: str) -> Builder | None:
        """Return a Builder that inserts nodes on behalf of ``owner``.

        None if graphs are no longer compared with the base.
        """
        return None


class PassContext:
    """The context that a plugin's pass receives in addition to the Program.

    A pass can read the facts that it declares as required, and must set those that it declares as ensured.

    Args:
        own: the pass, with its origin.
        host: the context of graftc's own passes.
        program: the Program to which the pass is applied.
    """

    def __init__(self, own: Pass[PassContext], host: PassHost, program: Program) -> None:
        assert own.origin is not None
        self._own, self._origin, self._host, self._program = own, own.origin, host, program
        self._left: set[str] = set()

    @property
    def spec(self) -> Spec:
        """The spec being compiled."""
        return self._host.requested_spec

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites of the Program, adapted or not; a stored tensor that is used several times has one site per use.

        Raises:
            GraftError: GC077 if the pass does not require ``"sites"``.
        """
        self._required(SITES)
        return tuple(self._host.every_site)

    @property
    def adapted(self) -> Mapping[str, tuple[Site, ...]]:
        """The sites of each adaptation, by adaptation name, in the order of the spec.

        Raises:
            GraftError: GC077 if the pass does not require ``"places"``.
        """
        self._required(PLACES)
        return {name: tuple(sites) for name, sites in self._host.adapted_sites.items()}

    def __getitem__(self, fact: str) -> Any:
        """Return the value that another plugin's pass has set for a fact.

        Raises:
            GraftError: GC077 if the pass does not require the fact, or if the fact has no value.
        """
        self._required(fact)
        if fact not in self._host.findings.facts:
            raise self._error(f"reads the value of {fact!r}, which has none", f"{fact!r} is one of graftc's own facts")
        return self._host.findings.facts[fact]

    def __setitem__(self, fact: str, value: Any) -> None:
        """Set the value of a fact that the pass ensures.

        Raises:
            GraftError: GC077 if the pass does not declare that it ensures the fact.
        """
        if fact not in self._own.ensures:
            raise self._error(f"sets {fact!r}, but does not declare that it ensures it", f"add ensures={{{fact!r}}}")
        self._host.findings.facts[fact] = value
        self._left.add(fact)

    def figure(self, name: str, value: float, site: Site | None = None) -> None:
        """Report a figure.

        `compiled.report`, ``graftc check``, ``compile`` and ``inspect`` show the figures for the first signature's
        graphs.

        Args:
            name: the name of the figure, such as ``"multiply_adds"``.
            value: a finite number.
            site: the site to which the figure belongs; by default, the whole model. A later figure with the same name
                and site replaces an earlier one.

        Raises:
            GraftError: GC077 for a value that is not a finite number, and in the pipeline ``lower``.
        """
        if not self._host.keeps_figures:
            raise self._error(f"reports {name!r} where figures are ignored", "add it to the pipeline 'adapt' or 'eval'")
        given: Any = value  # a plugin may pass a value of any type
        try:
            number = float(given) if not isinstance(given, bool) and isinstance(given, Real) else nan
        except (OverflowError, TypeError, ValueError):
            number = nan
        if not isfinite(number):
            raise self._error(f"reports {value!r} as {name!r}, which is not a finite number", "pass a finite number")
        key = str(site.key) if site is not None else ""
        layer, stack = (site.layer, site.stack) if site is not None else (None, "")
        figures = self._host.findings.figures.setdefault(self._own, {})
        figures[name, key] = PassFigure(str(name), key, layer, stack, number)

    def builder(self) -> Builder:
        """Return a Builder that inserts nodes and tensors on behalf of the pass: ``with build.on(site): ...``.

        Raises:
            GraftError: GC077 for a pass with ``rewrites=False``, in the pipeline ``lower``, or if an adaptation has the
                same name as the pass.
        """
        if not self._own.rewrites:
            raise self._error("requests a Builder, but has rewrites=False", "set rewrites=True")
        if self._own.name in self.spec.owners:
            raise self._error("has the same name as an adaptation", "rename the adaptation")
        build = self._host.inserting(self._program, self._own.name)
        if build is None:
            raise self._error("requests a Builder where none is available", "change lowered graphs with torch.fx")
        return build

    def run(self) -> Program | None:
        """Apply the pass, and check that it sets the facts that it ensures.

        Raises:
            GraftError: GC077 if it does not, or if it returns something other than None or a Program.
        """
        self._host.findings.figures[self._own] = {}
        after: Any = self._own.apply(self._program, self)
        if after is not None and not isinstance(after, Program):
            raise self._error(f"returns a value {kind_of(after)}", "return None or another Program")
        missing = sorted(self._own.ensures - self._left)
        if missing:
            raise self._error(
                f"declares that it ensures {missing[0]!r}, but does not set a value for it",
                f"set context[{missing[0]!r}]",
            )
        return after

    def _required(self, fact: str) -> None:
        if fact not in self._own.requires:
            close = nearest(fact, sorted(self._own.requires))
            hint = f"did you mean {close[0]!r}?" if close else f"add {fact!r} to the pass's requires"
            raise self._error(f"reads {fact!r}, but does not declare that it requires it", hint)

    def _error(self, message: str, hint: str) -> GraftError:
        message = f"the pass {self._own.name!r} of {self._origin} {message}"
        return GraftError("GC077", message, place=self._origin.place, hint=hint)
