"""Figures reported by passes of plugins, as rows; figures that are the same in several layers share one row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from graftc.compiler.roles.findings import format_layers
from graftc.passes.core.pass_context import PassFigure, PassRecord

COLUMNS = ("pass", "figure", "site", "layers", "value")
"""Names of the columns of a table of `figure_rows`."""


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
        """Return one line of a table, in the order of `COLUMNS`."""
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


def passes_json(records: Iterable[PassRecord]) -> list[dict[str, Any]]:
    """Return the records as plain values."""
    return [{**asdict(record), "figures": [asdict(figure) for figure in record.figures]} for record in records]
