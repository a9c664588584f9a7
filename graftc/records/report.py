"""The report of what a spec adds to a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from graftc.records.anchor import TimedAnchor
from graftc.records.fields import BaseParameters, Name, OwnerMethod, Passes, Percent, TrainableParameters
from graftc.records.passes import FIGURE_COLUMNS, PassName, figure_rows
from graftc.specs.errors.markup import Html, bullets, folded, table
from graftc.specs.records.record import Record

StackLevel = Literal["graph", "layers", "modules", "none"]
"""A part of the one graph of the model; graphs of its layers, or of parts that hold all their tensors; graphs of single
maps; none, and nothing is adapted."""


@dataclass(frozen=True)
class Cost(Record):
    """The cost of an adaptation."""

    sites: Annotated[int, Ge(0)]
    """How many sites are adapted."""

    trainable_parameters: Annotated[int, Ge(0)]
    """Elements that train."""

    frozen_parameters: Annotated[int, Ge(0)]
    """Elements that are added and do not train."""

    bytes: Annotated[int, Ge(0)]
    """Size of all tensors that are added."""

    flops_per_token: Annotated[float, Ge(0)]
    """Additional operations of a forward pass in eval mode for one token, two per multiply-add."""


@dataclass(frozen=True)
class AdaptationReport(Cost, published="AdaptationData"):
    """One adaptation's cost; the `train:` list and new tokens are entries too."""

    name: Name

    method: OwnerMethod


@dataclass(frozen=True)
class Totals(Cost):
    """Sums over all adaptations, the `train:` list included."""


@dataclass(frozen=True)
class StepReport(Record, published="CompileStepData"):
    """A step of compiling."""

    name: PassName

    seconds: Annotated[float, Ge(0)]
    """How long all its runs took."""


@dataclass(frozen=True)
class StackReport(Record, published="StackData"):
    """A stack of repeated layers."""

    stack: str
    """Path of the list that holds them."""

    layers: Annotated[int, Ge(1)]
    """How many."""

    parameters: Annotated[int, Ge(0)]
    """Elements of what they hold, tied tensors once."""

    level: StackLevel
    """How much of them is a graph: a part of the model's one graph, each layer, single maps, nothing."""

    reason: str = ""
    """The obstacle to the next level, with the line of code where that is known; empty where there is none."""


@dataclass(frozen=True)
class Report(Record):
    """The cost of a spec for a model."""

    adaptations: tuple[AdaptationReport, ...]
    """One entry for each adaptation, the `train:` list last."""

    base_parameters: BaseParameters

    trainable_parameters: TrainableParameters

    trained_in_full: Annotated[int, Ge(0)]
    """Elements of the modules in the `train:` list."""

    deployed_parameters: Annotated[int, Ge(0)]
    """Elements that have to ship beside the base if nothing is folded; of experts that are averaged, one."""

    percent: Percent

    flops_per_token: Annotated[float, Ge(0)]
    """Operations of a forward pass of the base for one token, two per multiply-add."""

    capture_seconds: Annotated[float, Ge(0)]
    """How long capturing the model took."""

    rewrite_seconds: Annotated[float, Ge(0)]
    """How long rewriting its graphs took."""

    cached: bool
    """Whether the captured graphs came from the cache."""

    notes: tuple[str, ...] = ()
    """Changes made to the model so that it could be captured, and parts that could not be examined, for people."""

    anchors: tuple[TimedAnchor, ...] = ()
    """The source model's graphs held against the model itself, in each mode."""

    steps: tuple[StepReport, ...] = ()
    """How long each step of compiling took, in the order in which they began."""

    passes: Passes = ()

    stacks: tuple[StackReport, ...] = ()
    """How much of each stack of layers is a graph."""

    def _repr_html_(self) -> str:
        """Return HTML for notebooks: what trains, a table of the adaptations, notes and collapsed steps."""
        total = f"{self.trainable_parameters:,} of {self.base_parameters + self.trainable_parameters:,}"
        facts = [f"trainable parameters: {total} ({self.percent:.4f}%)"]
        facts += [f"trained in full: {self.trained_in_full:,}"] if self.trained_in_full else []
        facts.append(f"deployed beside the base: {self.deployed_parameters:,}")
        headings = ("adaptation", "method", "sites", "trainable", "frozen", "bytes", "FLOPs per token")
        rows = [
            (
                a.name,
                a.method,
                a.sites,
                *(f"{n:,}" for n in (a.trainable_parameters, a.frozen_parameters, a.bytes)),
                f"{a.flops_per_token:,.0f}",
            )
            for a in self.adaptations
        ]
        seconds = self.capture_seconds + self.rewrite_seconds
        steps = table(("step", "seconds"), [(s.name, f"{s.seconds:.2f}") for s in self.steps], ("seconds",))
        figures = [row.cells() for row in figure_rows(self.passes)]
        parts = [bullets(facts), table(headings, rows, headings[2:]), bullets(self.notes)]
        parts += [table(FIGURE_COLUMNS, figures, FIGURE_COLUMNS[-1:])] if figures else []
        return Html("".join(parts) + folded(f"compiled in {seconds:.1f} s", steps))
