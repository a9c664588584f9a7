"""A picture of the figures: time over the floor, and bytes saved for the backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["plot"]

COLOURS = {"torch": "#5f6368", "peft": "#b9bec4", "graftc": "#2f6fb0"}
AIM = "#c8553d"
BAR = 0.8
GAP = 0.7
"""Between groups, in rows."""


def rows(entries: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, float]]:
    """Names from top to bottom with where they stand: an entry that is compared with one above joins its group."""
    placed: list[tuple[str, float]] = []
    groups: dict[str, str] = {}
    at, last = 0.0, None
    for name, entry in entries.items():
        group = groups[name] = groups.get(entry["peer"] or "", name)
        if last is not None:
            at += 1 if group == last else 1 + GAP
        last = group
        placed.append((name, at))
    return placed


def plot(data: Mapping[str, Any], paths: Sequence[Path]) -> None:
    """Draw the figures.

    Args:
        data: from `report.figures`.
        paths: files to write; their suffixes say which formats.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    entries = data["entries"]
    placed = rows(entries)
    height = 1.5 + 0.27 * (placed[-1][1] + 1)
    # Dates and random ids would make each run's file another one.
    with pyplot.rc_context({"font.size": 9, "svg.hashsalt": "graftc", "svg.fonttype": "none"}):
        figure, (left, right) = pyplot.subplots(
            1, 2, figsize=(10.5, height), sharey=True, layout="constrained", width_ratios=[1.25, 1]
        )
        for name, at in placed:
            _time(left, entries[name], at)
            _bytes(right, entries, name, at)
        left.set_yticks([at for _, at in placed], [name for name, _ in placed])
        left.set_ylim(placed[-1][1] + 0.75, -0.75)
        left.axvline(1, color=COLOURS["torch"], linewidth=0.8, zorder=3)
        left.set_title("step over the floor (frozen base)", loc="left", fontsize=10)
        right.set_title("saved for the backward pass, MB", loc="left", fontsize=10)
        left.set_xlim(0.8, 1.08 * max([1.2, *(_reach(entry) for entry in entries.values())]))
        right.set_xlim(0, 1.14 * max(entry["saved_bytes"] for entry in entries.values()) / 1e6)
        for axes in (left, right):
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="x", color="#e4e6e8", linewidth=0.7)
            axes.set_axisbelow(True)
        legend: list[Any] = [Patch(color=COLOURS[library], label=library) for library in ("peft", "graftc")]
        legend.append(Line2D([], [], color=AIM, linewidth=2, label="aim: at most"))
        figure.legend(handles=legend, loc="outside lower center", ncols=3, frameon=False)
        for path in paths:
            metadata = {"Date": None} if path.suffix == ".svg" else {}
            figure.savefig(path, dpi=160, metadata=metadata)
        pyplot.close(figure)


def _reach(entry: Mapping[str, Any]) -> float:
    """How far to the right a bar and its whisker go."""
    return float(max(entry["over_floor"] or 0, *(entry["over_floor_quartiles"] or [0])))


def _time(axes: Any, entry: Mapping[str, Any], at: float) -> None:
    value = entry["over_floor"]
    if value is None:
        return
    axes.barh(at, value - 0.8, left=0.8, height=BAR, color=COLOURS[entry["library"]])
    low, high = entry["over_floor_quartiles"] or (value, value)
    axes.plot([low, high], [at, at], color="#222222", linewidth=0.9, solid_capstyle="butt")
    if entry["library"] != "torch":
        axes.annotate(f"{value:.2f}", (max(value, high), at), (4, 0), textcoords="offset points", va="center")
    aim = entry["aims"]["over_floor"]
    if aim is not None:
        axes.plot([aim, aim], [at - BAR / 2, at + BAR / 2], color=AIM, linewidth=2, solid_capstyle="butt", zorder=4)


def _bytes(axes: Any, entries: Mapping[str, Any], name: str, at: float) -> None:
    entry = entries[name]
    value = entry["saved_bytes"] / 1e6
    axes.barh(at, value, height=BAR, color=COLOURS[entry["library"]])
    axes.annotate(f"{value:.0f}", (value, at), (4, 0), textcoords="offset points", va="center")
    aim = entry["aims"]["saved_of_peer"]
    if aim is not None and entry["peer"] in entries:
        limit = aim * entries[entry["peer"]]["saved_bytes"] / 1e6
        axes.plot([limit] * 2, [at - BAR / 2, at + BAR / 2], color=AIM, linewidth=2, solid_capstyle="butt", zorder=4)
