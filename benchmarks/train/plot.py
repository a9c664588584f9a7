"""A plot of the figures: time over the floor, and bytes saved for the backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["plot"]

COLOURS = {"torch": "#5f6368", "peft": "#b9bec4", "graftc": "#2f6fb0"}
AIM = "#c8553d"
BAR = 0.8
GAP = 0.7
"""The gap between groups, in rows."""


def rows(entries: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, float]]:
    """Return the names from top to bottom with their positions; an entry compared with one above joins its group."""
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
        data: the figures from `report.figures`.
        paths: the files to write; their suffixes determine the formats.

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
    # Dates and random ids would make the file differ from run to run.
    with pyplot.rc_context({"font.size": 9, "svg.hashsalt": "graftc", "svg.fonttype": "none"}):
        figure, (left, right) = pyplot.subplots(
            1, 2, figsize=(10.5, height), sharey=True, layout="constrained", width_ratios=[1.25, 1]
        )
        left.set_yticks([at for _, at in placed], [name for name, _ in placed])
        left.set_ylim(placed[-1][1] + 0.75, -0.75)
        left.axvline(1, color=COLOURS["torch"], linewidth=0.8, zorder=3)
        left.set_title("time of a step over the floor (frozen base)", loc="left", fontsize=10)
        right.set_title("saved for the backward pass, MB", loc="left", fontsize=10)
        reach = [edge for entry in entries.values() for edge in _edges(entry)]
        low, high = min([1.0, *reach]), max([1.2, *reach])
        margin = 0.1 * (high - low)
        left.set_xlim(low - margin / 2 if low < 1 else 1, high + margin)
        right.set_xlim(0, 1.14 * max(entry["saved_bytes"] for entry in entries.values()) / 1e6)
        for name, at in placed:
            _time(left, entries, name, at)
            _bytes(right, entries, name, at)
        for axes in (left, right):
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="x", color="#e4e6e8", linewidth=0.7)
            axes.set_axisbelow(True)
        legend: list[Any] = [Patch(color=COLOURS[library], label=library) for library in ("peft", "graftc")]
        legend.append(Line2D([], [], color=AIM, linewidth=2, label="aim (at most)"))
        figure.legend(handles=legend, loc="outside lower center", ncols=3, frameon=False)
        for path in paths:
            metadata = {"Date": None} if path.suffix == ".svg" else {}
            figure.savefig(path, dpi=160, metadata=metadata)
        pyplot.close(figure)


def _edges(entry: Mapping[str, Any]) -> list[float]:
    """Return the extent of a bar and its whisker on both sides."""
    value = entry["over_floor"]
    return [] if value is None else [value, *(entry["over_floor_quartiles"] or ())]


def _time(axes: Any, entries: Mapping[str, Any], name: str, at: float) -> None:
    """Draw a bar that starts at the floor, so that its length is the cost of the adapters."""
    entry = entries[name]
    value = entry["over_floor"]
    if value is None:
        return
    axes.barh(at, value - 1, left=1, height=BAR, color=COLOURS[entry["library"]])
    low, high = entry["over_floor_quartiles"] or (value, value)
    if entry["library"] != "torch":
        axes.plot([low, high], [at, at], color="#222222", linewidth=0.9, solid_capstyle="butt", zorder=5)
    aims = [entry["aims"]["over_floor"]]
    aim, peer = entry["aims"]["over_peer"], entries.get(entry["peer"] or "")
    if aim is not None and peer is not None and peer["over_floor"] is not None:
        aims.append(aim * peer["over_floor"])
    _label(axes, f"{value:.2f}", max(value, high, 1), at, [limit for limit in aims if limit is not None])


def _bytes(axes: Any, entries: Mapping[str, Any], name: str, at: float) -> None:
    entry = entries[name]
    value = entry["saved_bytes"] / 1e6
    axes.barh(at, value, height=BAR, color=COLOURS[entry["library"]])
    aim, peer = entry["aims"]["saved_of_peer"], entries.get(entry["peer"] or "")
    limits = [aim * peer["saved_bytes"] / 1e6] if aim is not None and peer is not None else []
    _label(axes, f"{value:.0f}", value, at, limits)


def _label(axes: Any, text: str, end: float, at: float, aims: Sequence[float]) -> None:
    """Mark the aims, and write the figure after ``end``, or after the last mark that the text would overlap."""
    low, high = axes.get_xlim()
    for limit in aims:
        axes.plot([limit] * 2, [at - BAR / 2, at + BAR / 2], color=AIM, linewidth=2, solid_capstyle="butt", zorder=4)
        if end <= limit < end + 0.09 * (high - low):
            end = limit
    axes.annotate(text, (end, at), (5, 0), textcoords="offset points", va="center")
