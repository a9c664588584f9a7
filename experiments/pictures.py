"""The pictures of the page: accuracy over parameters and over the learning rate, and curves of little data.

Each is written twice, for light and for dark pages, as SVG with the same bytes from the same cells.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.cells import ROOT
from experiments.claims_plan import FEW, LOW_DATA, few
from experiments.placing import spread
from experiments.rows import Table, Trained
from experiments.store import FOLDER, replace
from experiments.tasks import VALIDATION
from experiments.training_plans import ALONE, FLOOR, FLOORS, LADDER, REPEATED, SEEDS, encoder_settings

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
_POINTS = 0.07
"""The room for a point with its interval, in decades."""
_LEVEL, _ABOVE = 0.5, 1.3
"""How far above the highest interval lines to names turn, and names are, in points."""


def over_parameters(axes: Any, theme: Theme, folder: Path) -> bool:
    """Draw test accuracies over the number of trained values; rows with several seeds have a name and an interval."""
    table = Table(encoder_settings()[0], REPEATED, folder)
    floors = {name: 100 * table.rows[name].interval().mean for name in (ALONE, FLOOR) if name in table.rows}
    for name, mean in floors.items():
        axes.axhline(mean, color=theme.text, linestyle="--" if name == ALONE else ":", linewidth=1)
        lowest = mean == min(floors.values())
        place = {"transform": axes.get_yaxis_transform(), "ha": "left", "va": "top" if lowest else "bottom"}
        axes.text(1.01, mean, name.replace(" on ", "\non "), color=theme.text, fontsize=8, **place)
    shown = [own for name, own in table.rows.items() if name not in FLOORS]
    least = min(floors.values(), default=0) - _BELOW
    below = [own for own in shown if 100 * own.first < least]
    above = sorted((own for own in shown if own not in below), key=lambda own: own.trained)
    named = [own for own in above if len(own.records) > 1]
    at = spread([math.log10(own.trained) for own in named], [_POINTS] * len(named))
    places = {own.row.name: 10**place for own, place in zip(named, at, strict=True)}
    for own in above:
        where = places.get(own.row.name, own.trained)
        axes.plot(where, 100 * own.first, marker="o", markersize=5, fillstyle="none", color=theme.series[5])
        interval = own.interval()
        if not math.isnan(interval.half):
            bar = {"fmt": "o", "markersize": 4, "color": theme.series[0]}
            axes.errorbar(where, 100 * interval.mean, yerr=100 * interval.half, **bar)
    if below:
        lowest_first = sorted(below, key=lambda own: own.first)
        names = "\n".join(f"{own.row.name} {100 * own.first:.1f}" for own in lowest_first)
        corner = {"transform": axes.transAxes, "va": "bottom", "fontsize": 8}
        axes.text(1.01, 0, f"lower:\n{names}", color=theme.text, **corner)
        axes.set_ylim(bottom=least)
    axes.set_xscale("log")
    axes.set_xlabel("trained values, besides the head")
    axes.set_ylabel("test accuracy, %")
    _names_above(axes, theme, named, places)
    return bool(shown)


def _names_above(axes: Any, theme: Theme, named: Sequence[Trained], places: Mapping[str, float]) -> None:
    """Write the names of rows in a line above the data, each with a line to its interval."""
    if not named:
        return
    tops = [100 * (own.interval().mean + own.interval().half) for own in named]
    level, height = max(tops) + _LEVEL, max(tops) + _ABOVE
    axes.set_ylim(top=height)
    axes.set_xlim(*axes.get_xlim())
    options = {"color": theme.text, "fontsize": 8, "ha": "center", "va": "bottom"}
    texts = [axes.text(places[own.row.name], height, own.row.name, **options) for own in named]
    axes.figure.canvas.draw()  # the layout, and with it the width of a name on the axis
    ends = [text.get_window_extent().transformed(axes.transData.inverted()) for text in texts]
    widths = [1.1 * math.log10(end.x1 / end.x0) + _POINTS / 2 for end in ends]
    centres = spread([math.log10(places[own.row.name]) for own in named], widths)
    for own, text, top, centre in zip(named, texts, tops, centres, strict=True):
        place, name = places[own.row.name], 10**centre
        text.set_x(name)
        path = [place, place, name], [top, level, height]
        axes.plot(*path, color=theme.text, linewidth=0.6, clip_on=False)


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


_SHIFTS = (0.96, 1.04)
"""Factors by which intervals of two rows are moved apart, so that they do not cover each other."""


def over_texts(axes: Any, theme: Theme, folder: Path) -> bool:
    """Draw test accuracies of full fine-tuning and of a prefix over the number of texts of a class."""
    drawn = False
    for row, colour, shift in zip(LOW_DATA, theme.series, _SHIFTS, strict=False):
        points: list[tuple[float, float, float]] = []
        for size in FEW:
            own = Table(few(size), dict.fromkeys(LOW_DATA, True), folder).rows.get(row.name)
            if own is not None and len(own.records) > 1:
                interval = own.interval()
                points.append((size * shift, 100 * interval.mean, 100 * interval.half))
        if points:
            sizes, means, halves = zip(*points, strict=True)
            options = {"marker": "o", "markersize": 4, "linewidth": 1.2, "capsize": 2}
            axes.errorbar(sizes, means, yerr=halves, color=colour, label=row.name, **options)
            drawn = True
    axes.set_xscale("log", base=2)
    axes.set_xticks(FEW, [str(size) for size in FEW])
    axes.set_xlabel("texts per class (Reuters R8)")
    axes.set_ylabel("test accuracy, %")
    _legend(axes, theme)
    return drawn


def _legend(axes: Any, theme: Theme) -> None:
    if axes.get_legend_handles_labels()[0]:
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2, "ncols": len(FIRST_SHOWN)}
        axes.legend(frameon=False, labelcolor=theme.text, fontsize=8, **place)


@dataclass(frozen=True)
class Picture:
    """A picture of the page.

    Attributes:
        title: what it shows, for those who do not see it.
        caption: what has to be known to read it.
        draw: the function that draws it.
    """

    title: str
    caption: str
    draw: Draw


DRAWN: Mapping[str, Picture] = {
    "parameters": Picture(
        "Test accuracy over the number of trained values",
        f"Reuters R52. Points with names: means and 95 % intervals over {len(SEEDS)} seeds; where such rows train "
        "about as many values, they are moved apart. Circles: the first seed of every row, the only one of those "
        "without a name.",
        over_parameters,
    ),
    "rates": Picture(
        "Validation accuracy over the learning rate",
        f"Reuters R52, one seed; one of the {VALIDATION} validation texts is {100 / VALIDATION:g} points.",
        over_rates,
    ),
    "little-data": Picture(
        "Test accuracy with little data",
        f"Reuters R8. Means and 95 % intervals over {len(few(FEW[0]).seeds)} seeds of each row alone; the table above "
        "has the differences between cells of the same seed. Both rows are moved apart a little.",
        over_texts,
    ),
}
"""By file name."""


def draw(folder: Path = FOLDER, to: Path = PICTURES) -> list[Path]:
    """Write the pictures for which there are cells, and return their paths.

    Raises:
        ImportError: matplotlib is not installed.
    """
    written = []
    for name, picture in DRAWN.items():
        for theme, colours in THEMES.items():
            with _axes(colours) as (figure, axes):
                if picture.draw(axes, colours, folder):
                    content, path = io.BytesIO(), to / f"{name}-{theme}.svg"
                    named = {"Date": None, "Title": picture.title}
                    figure.savefig(content, format="svg", metadata=named, transparent=True)
                    replace(path, content.getvalue())
                    written.append(path)
    return written


def shown(name: str, to: Path = PICTURES) -> Iterator[str]:
    """Yield the lines of the page for a picture and the command that makes it; none if it does not exist."""
    if all((to / f"{name}-{theme}.svg").exists() for theme in THEMES):
        picture = DRAWN[name]
        yield from (f"![{picture.title}](results/{name}-{theme}.svg#gh-{theme}-mode-only)" for theme in THEMES)
        yield f"\n{picture.caption}\n\n```\npython -m experiments pictures\n```\n"


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
