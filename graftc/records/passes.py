"""Passes of plugins that graphs went through."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, TypeAlias

from annotated_types import Ge
from pydantic import Field

from graftc.specs.errors.text import format_layers
from graftc.specs.records.record import Record

FIGURE_COLUMNS = ("pass", "figure", "site", "layers", "value")
"""Names of the columns of a table of `figure_rows`."""


PassName: TypeAlias = Annotated[str, Field(description="Its name, as in the history of a graph.")]


@dataclass(frozen=True)
class PassFigure(Record, closed=True):
    """A figure that a pass of a plugin reports."""

    name: str
    """The name of the figure."""

    site: str
    """The place that it is of; empty where it is of the whole model."""

    layer: Annotated[int | None, Ge(0)]
    """Index of the place's layer; null outside of the layers."""

    stack: str
    """Path of the list of layers; empty outside of them."""

    value: float
    """The number."""


@dataclass(frozen=True)
class PassRecord(Record, published="PassData", closed=True):
    """A pass of a plugin that the graphs went through."""

    pipeline: str
    """The pipeline that it was added to: `adapt` or `eval`."""

    name: PassName

    distribution: str
    """The package that brings it."""

    version: str
    """The package's version."""

    rewrites: bool
    """Whether it may change graphs."""

    figures: tuple[PassFigure, ...] = ()
    """Its figures for the graphs of the first signature."""

    def __str__(self) -> str:
        return f"the pass {self.name!r} of {self.distribution} {self.version}".rstrip()


@dataclass(frozen=True)
class FigureRow:
    """A figure with one value, at one site of one or several layers.

    Attributes:
        step: name of the pass.
        name: name of the figure.
        site: the place, with ``*`` for the layer; empty for a figure of the whole model.
        layers: the layers that have it; empty outside the layers.
        value: the value at each of them.
    """

    step: str
    name: str
    site: str
    layers: str
    value: float

    def cells(self) -> tuple[str, ...]:
        """Return one line of a table, in the order of `FIGURE_COLUMNS`."""
        number = f"{self.value:,.0f}" if self.value.is_integer() else f"{self.value:,.6g}"
        return self.step, self.name, self.site or "whole model", self.layers, number


def figure_rows(records: Iterable[PassRecord]) -> list[FigureRow]:
    """Return all figures, in the order in which they were first reported."""
    layers: dict[tuple[str, str, str, float], list[int]] = {}
    for record in records:
        for figure in record.figures:
            numbers = layers.setdefault((record.name, figure.name, _without_layer(figure), figure.value), [])
            numbers += [figure.layer] if figure.layer is not None else []
    return [FigureRow(*key[:3], format_layers(numbers), key[3]) for key, numbers in layers.items()]


def _without_layer(figure: PassFigure) -> str:
    own = f"{figure.stack}.{figure.layer}."
    within = figure.layer is not None and figure.site.startswith(own)
    return f"{figure.stack}.*.{figure.site.removeprefix(own)}" if within else figure.site
