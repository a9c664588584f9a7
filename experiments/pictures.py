"""The pictures of the page: accuracy over parameters and over the learning rate, and curves of little data.

Each is written twice, for light and for dark pages, as SVG with the same bytes from the same cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from experiments.cells import ROOT
from experiments.claims_plan import FEW, LOW_DATA, few
from experiments.rows import Table
from experiments.store import FOLDER
from experiments.training_plans import ALONE, FLOOR, FLOORS, LADDER, REPEATED, encoder_settings

PICTURES = ROOT / "docs" / "results"
WIDTH = 7.2
"""In inches; text is readable where the page shows a picture in one column."""
FIRST_SHOWN = ("full", "LoRA", "Houlsby", "prefix", "SpIEL", "BitFit")


@dataclass(frozen=True)
class Theme:
    """Colours of text, lines behind the data, and series."""

    text: str
    grid: str
    series: tuple[str, ...]


THEMES: Mapping[str, Theme] = {
    "light": Theme("#24292f", "#d8dee4", ("#2f6fb0", "#c8553d", "#3a7d44", "#8a4fbe", "#b07d12", "#52606d", "#0f7c8a")),
    "dark": Theme("#e6edf3", "#3d444d", ("#79b8ff", "#ff9b82", "#7fd18b", "#c9a2f2", "#e3b341", "#a9b4c0", "#6fd3e0")),
}
Draw = Callable[[Any, Theme, Path], bool]
"""A function that draws on axes from the cells in a folder, and returns whether there was anything to draw."""


_BELOW = 3
"""How many points below the lowest floor a picture begins."""
_WIDTH, _HEIGHT = 0.45, 0.6
"""The room for a label, in decades and in points."""


def over_parameters(axes: Any, theme: Theme, folder: Path) -> bool:
    """Draw test accuracies over the number of trained values; rows with several seeds have a name and an interval."""
    table = Table(encoder_settings()[0], REPEATED, folder)
    floors = {name: 100 * table.rows[name].interval().mean for name in (ALONE, FLOOR) if name in table.rows}
    for name, mean in floors.items():
        axes.axhline(mean, color=theme.text, linestyle="--" if name == ALONE else ":", linewidth=1)
        lowest = mean == min(floors.values())
        place = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "top" if lowest else "bottom"}
        axes.text(1, mean, name, color=theme.text, fontsize=8, **place)
    shown = [own for name, own in table.rows.items() if name not in FLOORS]
    least = min(floors.values(), default=0) - _BELOW
    below = [own for own in shown if 100 * own.first < least]
    labels: list[tuple[float, float]] = []
    for own in sorted((own for own in shown if own not in below), key=lambda own: own.trained):
        interval = own.interval()
        axes.plot(own.trained, 100 * own.first, marker="o", markersize=5, fillstyle="none", color=theme.series[5])
        if not math.isnan(interval.half):
            bar = {"fmt": "o", "markersize": 4, "color": theme.series[0]}
            axes.errorbar(own.trained, 100 * interval.mean, yerr=100 * interval.half, **bar)
        if len(own.records) > 1:
            at, mean = math.log10(own.trained), 100 * interval.mean
            taken = [y for x, y in labels if abs(at - x) < _WIDTH]
            heights = (mean + sign * _HEIGHT * step for step in count() for sign in (1, -1))
            height = next(height for height in heights if all(abs(height - y) >= _HEIGHT for y in taken))
            labels.append((at, height))
            axes.text(1.12 * own.trained, height, own.row.name, color=theme.text, fontsize=8, va="center")
    if below:
        lowest_first = sorted(below, key=lambda own: own.first)
        names = ", ".join(f"{own.row.name} {100 * own.first:.1f}" for own in lowest_first)
        place = {"transform": axes.transAxes, "va": "bottom", "fontsize": 8}
        axes.text(0.01, 0.01, f"lower: {names}", color=theme.text, **place)
        axes.set_ylim(bottom=least)
    axes.set_xscale("log")
    axes.set_xlabel("trained values, besides the head")
    axes.set_ylabel("test accuracy, % (circles: first seed)")
    return bool(shown)


def over_rates(axes: Any, theme: Theme, folder: Path) -> bool:
    """Draw validation accuracies of the sweeps over the learning rate."""
    table = Table(encoder_settings()[0], REPEATED, folder)
    shown = [name for name in FIRST_SHOWN if name in table.rows]
    for name, colour in zip(shown, theme.series, strict=False):
        points = list(table.sweep(table.rows[name].row))
        rates, values = [rate for rate, _ in points], [100 * figures["validation"] for _, figures in points]
        axes.plot(rates, values, marker="o", markersize=4, linewidth=1.2, color=colour, label=name)
    axes.set_xscale("log")
    axes.set_xlim(LADDER[0] / 1.5, LADDER[-1] * 1.5)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("validation accuracy, %")
    _legend(axes, theme)
    return bool(shown)


def over_texts(axes: Any, theme: Theme, folder: Path) -> bool:
    """Draw test accuracies of full fine-tuning and of a prefix over the number of texts of a class."""
    drawn = False
    for row, colour in zip(LOW_DATA, theme.series, strict=False):
        points: list[tuple[int, float, float]] = []
        for size in FEW:
            own = Table(few(size), dict.fromkeys(LOW_DATA, True), folder).rows.get(row.name)
            if own is not None and len(own.records) > 1:
                interval = own.interval()
                points.append((size, 100 * interval.mean, 100 * interval.half))
        if points:
            sizes, means, halves = zip(*points, strict=True)
            options = {"marker": "o", "markersize": 4, "linewidth": 1.2, "capsize": 2}
            axes.errorbar(sizes, means, yerr=halves, color=colour, label=row.name, **options)
            drawn = True
    axes.set_xscale("log", base=2)
    axes.set_xticks(FEW, [str(size) for size in FEW])
    axes.set_xlabel("texts of each class (Reuters R8)")
    axes.set_ylabel("test accuracy, %")
    _legend(axes, theme)
    return drawn


def _legend(axes: Any, theme: Theme) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, labelcolor=theme.text, fontsize=8)


DRAWN: Mapping[str, tuple[str, Draw]] = {
    "parameters": ("Test accuracy over the number of trained values", over_parameters),
    "rates": ("Validation accuracy over the learning rate", over_rates),
    "little-data": ("Test accuracy with little data", over_texts),
}
"""By file name: what a picture shows, and the function that draws it."""


def draw(folder: Path = FOLDER, to: Path = PICTURES) -> list[Path]:
    """Write the pictures for which there are cells, and return their paths.

    Raises:
        ImportError: matplotlib is not installed.
    """
    written = []
    for name, (_, function) in DRAWN.items():
        for theme, colours in THEMES.items():
            with _axes(colours) as (figure, axes):
                if function(axes, colours, folder):
                    to.mkdir(parents=True, exist_ok=True)
                    path = to / f"{name}-{theme}.svg"
                    figure.savefig(path, metadata={"Date": None}, transparent=True)
                    written.append(path)
    return written


def shown(name: str, to: Path = PICTURES) -> Iterator[str]:
    """Yield the lines of the page for a picture and the command that makes it; none if it does not exist."""
    if all((to / f"{name}-{theme}.svg").exists() for theme in THEMES):
        title, _ = DRAWN[name]
        yield from (f"![{title}](results/{name}-{theme}.svg#gh-{theme}-mode-only)" for theme in THEMES)
        yield "\n```\npython -m experiments pictures\n```\n"


@contextmanager
def _axes(theme: Theme) -> Iterator[tuple[Any, Any]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings: Any = {
        **{"font.size": 9, "svg.hashsalt": "graftc", "svg.fonttype": "none"},
        **{f"{part}.color": theme.text for part in ("text", "xtick", "ytick")},
        **{"axes.labelcolor": theme.text, "axes.edgecolor": theme.grid},
    }
    with pyplot.rc_context(settings):
        figure, axes = pyplot.subplots(figsize=(WIDTH, 0.58 * WIDTH), layout="constrained")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=theme.grid, linewidth=0.6)
        axes.set_axisbelow(True)
        yield figure, axes
        pyplot.close(figure)
