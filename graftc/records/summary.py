"""A summary of what is adapted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from graftc.records.fields import BaseParameters, Name, OwnerMethod, Passes, Percent, TrainableParameters
from graftc.records.passes import FIGURE_COLUMNS, figure_rows
from graftc.specs.errors.markup import Html, bullets, table, tag
from graftc.specs.records.record import Record


@dataclass(frozen=True)
class AdaptationSummary(Record):
    """One adaptation."""

    name: Name

    method: OwnerMethod

    places: Annotated[int, Ge(0)]
    """How many places it adapts; of what trains in full, how many base tensors."""

    roles: tuple[str, ...]
    """The roles of its places."""

    layers: str
    """The layers that they are in, as text."""

    trainable_parameters: Annotated[int, Ge(0)]
    """Elements that it adds and that train."""

    frozen_parameters: Annotated[int, Ge(0)]
    """Elements that it adds and that do not train."""

    tensors: Annotated[int, Ge(0)]
    """How many tensors it adds."""

    nodes: Annotated[int, Ge(0)]
    """How many nodes of the eval graph it inserted."""


@dataclass(frozen=True)
class Summary(Record):
    """The adapted sites, and how much trains."""

    model: str
    """Class of the source model."""

    adaptations: tuple[AdaptationSummary, ...]
    """New tokens first, the `train:` list last."""

    base_parameters: BaseParameters

    base_tensors: Annotated[int, Ge(0)]
    """How many tensors the base has, tied ones once."""

    trainable_parameters: TrainableParameters

    trained_in_full: Annotated[int, Ge(0)]
    """Elements of the `train:` list."""

    percent: Percent

    nodes: Annotated[int, Ge(0)]
    """How many nodes the eval graph has, without reads of tensors."""

    inserted: Annotated[int, Ge(0)]
    """How many of them were inserted."""

    passes: Passes = ()

    def _repr_html_(self) -> str:
        """Return HTML for notebooks: the model, what trains, and a table of the adaptations."""
        total = f"{self.trainable_parameters:,} of {self.base_parameters + self.trainable_parameters:,}"
        facts = [f"trainable parameters: {total} ({self.percent:.4f}%)"]
        facts += [f"trained in full: {self.trained_in_full:,}"] if self.trained_in_full else []
        headings = ("adaptation", "method", "places", "roles", "layers", "trainable", "frozen")
        rows = [
            (
                a.name,
                a.method,
                a.places,
                ", ".join(a.roles),
                a.layers,
                f"{a.trainable_parameters:,}",
                f"{a.frozen_parameters:,}",
            )
            for a in self.adaptations
        ]
        adaptations = table(headings, rows, ("places", "trainable", "frozen"))
        lines = [row.cells() for row in figure_rows(self.passes)]
        figures = table(FIGURE_COLUMNS, lines, FIGURE_COLUMNS[-1:]) if lines else ""
        return Html(tag("b", f"Compiled {self.model}") + bullets(facts) + adaptations + figures)
