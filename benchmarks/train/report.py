"""The report on measurements: ratios and aims as JSON, and a text in Markdown."""

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
"""The fields of `Aims`, which have the names of the figures that they limit."""


def machine() -> dict[str, Any]:
    """Describe the machine and its current load."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
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
    """Return all figures of a run, as JSON.

    Args:
        found: the measurements; ratios to the floor need an entry named ``floor``.
        skipped: the reasons why other entries were not measured.
        shape: the sizes of the model.
        command: the command that started the run.
        date: the time when it started.
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
    """Return the ratios of the rounds, each between two steps that ran close together."""
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
        name: number <= wanted
        for name, wanted in asdict(aims).items()
        if wanted is not None and (number := numbers[name]) is not None
    }


def as_markdown(data: Mapping[str, Any], picture: str | None = None) -> str:
    """Return the report in Markdown.

    Args:
        data: the figures from `figures`.
        picture: the path of a plot to show, relative to the text.
    """
    return "\n".join(_lines(data, picture)) + "\n"


def _lines(data: Mapping[str, Any], picture: str | None) -> Iterator[str]:
    host, model = data["machine"], data["model"]
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
        f"Machine: {host.get('gpu') or host['processor']}, "
        f"{host['cores']} cores, {host['threads']} threads, {host['capability']}; "
        f"{host['system']}; load {load_text(host['load'])} before and {load_text(host['load_after'])} after. "
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
    """Return the load of the last minute as text, or "unknown" if there is none."""
    return "unknown" if load is None else f"{load[0]:.1f}"


def cell(entry: Mapping[str, Any], figure: str) -> str:
    """Return a figure as text, with its aim."""
    value, aim = entry[figure], entry["aims"][figure]
    if value is None:
        return "-"
    text = f"{value:.2f}"
    if aim is None:
        return text
    return f"{text} ({aim:.2f})" if entry["reached"][figure] else f"**{text}** ({aim:.2f})"
