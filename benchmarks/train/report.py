"""Figures from measurements: ratios, what was aimed at, and a text for people and one for programs."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.train.contestants import Aims
from benchmarks.train.measure import Measured
from benchmarks.train.models import Shape

__all__ = ["as_markdown", "cell", "figures", "machine"]

FLOOR = "floor"
PACKAGES = ("torch", "transformers", "peft", "graftc")
AIMS = ("over_floor", "over_peer", "saved_of_peer", "peak_of_peer")
"""Fields of `Aims`, and the figures of the same names that they are about."""


def machine() -> dict[str, Any]:
    """The machine, and how busy it is at the moment."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    return next(named, platform.machine())


def figures(
    found: Sequence[Measured],
    skipped: Mapping[str, str],
    shape: Shape,
    *,
    command: str,
    date: str,
    before: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that is to be known about a run, as JSON.

    Args:
        found: what was measured; ratios to the floor need an entry of that name.
        skipped: why others were not.
        shape: sizes of the model.
        command: that started the run.
        date: when it started.
        before: the machine when it started.
    """
    by_name = {measured.entry.name: measured for measured in found}
    return {
        "machine": {**before, "load_after": machine()["load"]},
        "versions": {package: version(package) for package in PACKAGES},
        "command": command,
        "date": date,
        "model": asdict(shape),
        "rounds": len(found[0].timing.step) if found else 0,
        "entries": {measured.entry.name: _figures(measured, by_name) for measured in found},
        "skipped": dict(skipped),
    }


def _figures(measured: Measured, by_name: Mapping[str, Measured]) -> dict[str, Any]:
    entry, timing = measured.entry, measured.timing
    floor, peer = by_name.get(FLOOR), by_name.get(entry.peer or "")
    numbers = {
        "over_floor": _ratio(measured, floor),
        "over_peer": _ratio(measured, peer),
        "saved_of_peer": measured.saved / peer.saved if peer is not None else None,
        "peak_of_peer": measured.peak / peer.peak if peer is not None else None,
    }
    return {
        "library": entry.library,
        "peer": entry.peer,
        "trained_parameters": measured.trained,
        "loss": measured.loss,
        "seconds": {
            "median": statistics.median(timing.step),
            "least": min(timing.step),
            "forward_median": statistics.median(timing.forward),
            "backward_median": statistics.median(timing.backward),
            "processor_median": statistics.median(timing.processor),
        },
        **numbers,
        "over_floor_quartiles": _quartiles(measured, floor),
        "over_floor_of_least": _least_ratio(measured, floor),
        "over_peer_of_least": _least_ratio(measured, peer),
        "saved_bytes": measured.saved,
        "peak_bytes": measured.peak,
        "aims": asdict(entry.aims),
        "reached": _reached(entry.aims, numbers),
        "rounds": asdict(timing),
    }


def _turns(measured: Measured, other: Measured) -> list[float]:
    """Ratios of the rounds, each of two steps that were a moment apart."""
    return [a / b for a, b in zip(measured.timing.step, other.timing.step, strict=True)]


def _ratio(measured: Measured, other: Measured | None) -> float | None:
    return None if other is None else statistics.median(_turns(measured, other))


def _least_ratio(measured: Measured, other: Measured | None) -> float | None:
    return None if other is None else min(measured.timing.step) / min(other.timing.step)


def _quartiles(measured: Measured, other: Measured | None) -> list[float] | None:
    if other is None or len(measured.timing.step) < 2:
        return None
    low, _, high = statistics.quantiles(_turns(measured, other), n=4, method="inclusive")
    return [low, high]


def _reached(aims: Aims, numbers: Mapping[str, float | None]) -> dict[str, bool]:
    return {
        name: found <= wanted
        for name, wanted in asdict(aims).items()
        if wanted is not None and (found := numbers[name]) is not None
    }


def as_markdown(data: Mapping[str, Any], picture: str | None = None) -> str:
    """The figures for people.

    Args:
        data: from `figures`.
        picture: a plot to show, by its path from the text.
    """
    return "\n".join(_lines(data, picture)) + "\n"


def _lines(data: Mapping[str, Any], picture: str | None) -> Iterator[str]:
    here, model = data["machine"], data["model"]
    yield "# A training step: graftc and peft"
    yield ""
    yield f"Made by `{data['command']}` on {data['date']}; [how to read it](../README.md)."
    yield ""
    yield (
        f"Model: Llama-shaped, {model['width']} wide, {model['layers']} layers, {model['heads']} heads, feed-forward "
        f"{model['intermediate']}, batch {model['batch']} x {model['length']}, rank {model['rank']}, all seven "
        "projections, float32, eager."
    )
    yield ""
    yield (
        f"Machine: {here['processor']}, {here['cores']} cores, {here['threads']} threads, {here['capability']}; "
        f"{here['system']}; load {load_text(here['load'])} before and {load_text(here['load_after'])} after. "
        + ", ".join(f"{name} {number}" for name, number in data["versions"].items())
        + f". Medians of {data['rounds']} alternated rounds; an aim stands in brackets, **bold** where it was missed."
    )
    if picture is not None:
        yield ""
        yield f"![Time over the floor and bytes saved for the backward pass]({picture})"
    yield ""
    yield "| | step, ms | over the floor | over peft | saved, MB | of peft's | peak, MB | of peft's |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for name, entry in data["entries"].items():
        cells = [name, f"{1e3 * entry['seconds']['median']:.0f}"]
        cells += [cell(entry, "over_floor"), cell(entry, "over_peer")]
        cells += [f"{entry['saved_bytes'] / 1e6:.1f}", cell(entry, "saved_of_peer")]
        cells += [f"{entry['peak_bytes'] / 1e6:.1f}", cell(entry, "peak_of_peer")]
        yield "| " + " | ".join(cells) + " |"
    for name, why in data["skipped"].items():
        yield f"\nSkipped: {name} ({why})."


def load_text(load: Sequence[float] | None) -> str:
    """The load of the last minute; "unknown" where there is none."""
    return "unknown" if load is None else f"{load[0]:.1f}"


def cell(entry: Mapping[str, Any], figure: str) -> str:
    """A figure as text, with what was aimed at."""
    found, aim = entry[figure], entry["aims"][figure]
    if found is None:
        return "-"
    text = f"{found:.2f}"
    if aim is None:
        return text
    return f"{text} ({aim:.2f})" if entry["reached"][figure] else f"**{text}** ({aim:.2f})"
