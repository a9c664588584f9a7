"""The report on whole training steps: the figures as JSON, and a text in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.sparse.entries import CYCLE, LORA, PAPER
from benchmarks.sparse.times import Timed, cycle_mean, ordinary, ordinary_median
from benchmarks.train.report import FLOOR, load_text

__all__ = ["as_markdown", "group_figures"]

PARTS = ("base", "trained", "state", "gradient", "rest")


def group_figures(
    found: Sequence[Timed], memory: Mapping[str, Mapping[str, Any]], skipped: Mapping[str, str], **setting: Any
) -> dict[str, Any]:
    """Return the figures of all entries on one base, with or without checkpointing.

    Args:
        found: the measured times.
        memory: the figures of memory by the name of the entry.
        skipped: the reason by the name of each entry that could not run.
        setting: the setting of the group: ``dtype`` and ``checkpointing``.
    """
    by_name = {timed.entry.name: timed for timed in found}
    entries = {timed.entry.name: _figures(timed, by_name, memory) for timed in found}
    return {**setting, "entries": entries, "skipped": dict(skipped)}


def _figures(timed: Timed, by_name: Mapping[str, Timed], memory: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    name, numbers = timed.entry.name, timed.numbers
    own, peers = memory.get(name), memory.get(timed.entry.peer or "")
    return {
        "library": timed.entry.library,
        "peer": timed.entry.peer,
        "loss": timed.loss,
        "seconds": {
            "ordinary_median": ordinary_median(timed.seconds, numbers),
            "cycle_mean": cycle_mean(timed.seconds, numbers),
            "longest_place": _longest(timed),
            "least": min(timed.seconds),
            "processor_median": ordinary_median(timed.processor, numbers),
        },
        "over_floor": _ratios(timed, by_name.get(FLOOR)),
        "over_peer": _ratios(timed, by_name.get(timed.entry.peer or "")),
        "memory": None if own is None else dict(own),
        "memory_of_peer": None if own is None or peers is None else own["peak_bytes"] / peers["peak_bytes"],
        "rounds": {"seconds": timed.seconds, "processor": timed.processor, "numbers": numbers},
    }


def _longest(timed: Timed) -> float | None:
    """Return the longest median among the places of a cycle that are not ordinary: where entries are replaced."""
    places: dict[int, list[float]] = {}
    for value, number in zip(timed.seconds, timed.numbers, strict=True):
        if not ordinary(number):
            places.setdefault(number % CYCLE, []).append(value)
    return max(map(statistics.median, places.values()), default=None)


def _ratios(timed: Timed, other: Timed | None) -> dict[str, float | None] | None:
    if other is None:
        return None
    ratios, processor = timed.over(other), timed.processor_over(other)
    return {
        "ordinary": ordinary_median(ratios, timed.numbers),
        "cycle": cycle_mean(ratios, timed.numbers),
        "ordinary_of_processor": ordinary_median(processor, timed.numbers),
        "cycle_of_processor": cycle_mean(processor, timed.numbers),
    }


def as_markdown(data: Mapping[str, Any]) -> str:
    """Return the report in Markdown.

    Args:
        data: the machine, the model, and the groups.
    """
    return "\n".join(_lines(data)) + "\n"


def _lines(data: Mapping[str, Any]) -> Iterator[str]:
    model, host = data["model"], data["machine"]
    yield "# A whole training step: full fine-tuning, LoRA and sparse deltas"
    yield ""
    yield f"Made by `{data['command']}` on {data['date']}; [how to read it](../README.md#sparse-deltas)."
    yield ""
    yield (
        f"Model: Llama-shaped, {model['width']} wide, {model['layers']} layers, {model['heads']} heads, feed-forward "
        f"{model['intermediate']}, vocabulary {model['vocabulary']}, batch {model['batch']} x {model['length']}, "
        f"eager; LoRA of rank {model['rank']} on all seven projections, and sparse deltas with as many values."
    )
    yield ""
    yield (
        f"Machine: {data['device']}; {host['processor']}, {host['cores']} cores, {host['threads']} threads, "
        f"{host['capability']}; load {load_text(host['load'])} before and {load_text(host['load_after'])} after. "
        + ", ".join(f"{name} {number}" for name, number in data["versions"].items())
        + f". Medians of {data['rounds']} alternated rounds."
    )
    for group in data["groups"]:
        yield ""
        yield f"## {group['dtype']}, {_checkpointing(group['checkpointing'])}"
        yield ""
        yield from _times(group)
        yield ""
        yield from _memory(group)
        for name, why in group["skipped"].items():
            yield f"\nSkipped: {name} ({why})."
    yield ""
    yield from _beside_the_paper(data)


def _checkpointing(on: bool) -> str:
    return "with activation checkpointing" if on else "without activation checkpointing"


def _times(group: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"| | trained values | step, ms | mean of a cycle, ms | longest place, ms | over the floor | over {LORA} "
        "| of processor time | over a cycle |"
    )
    yield "| --- |" + " ---: |" * 8
    for name, entry in group["entries"].items():
        seconds, memory = entry["seconds"], entry["memory"]
        floor, peer = entry["over_floor"] or {}, entry["over_peer"] or {}
        cells = [
            name,
            "-" if memory is None else f"{memory['trained_parameters']:,}",
            *(_scaled(seconds[figure], 1e3) for figure in ("ordinary_median", "cycle_mean", "longest_place")),
            _ratio(floor.get("ordinary")),
            *(_ratio(peer.get(figure)) for figure in ("ordinary", "ordinary_of_processor", "cycle")),
        ]
        yield "| " + " | ".join(cells) + " |"


def _memory(group: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"| | trained, state | peak, MB | of {LORA}'s | base | trained | state | gradients | activations and the rest "
        "| peak as the system saw it |"
    )
    yield "| --- | --- |" + " ---: |" * 8
    for name, entry in group["entries"].items():
        memory = entry["memory"]
        if memory is None:
            continue
        cells = [
            name,
            f"{memory['trained_dtype']}, {memory['state_dtype']}",
            _scaled(memory["peak_bytes"], 1e-6),
            _ratio(entry["memory_of_peer"]),
            *(_scaled(memory[f"{part}_bytes"], 1e-6) for part in PARTS),
            _scaled(memory["witness_bytes"], 1e-6),
        ]
        yield "| " + " | ".join(cells) + " |"


def _beside_the_paper(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield a table of ratios over LoRA: the paper's, and the measured ones by dtype."""
    dtypes = list(dict.fromkeys(group["dtype"] for group in data["groups"]))
    yield "## Beside the paper"
    yield ""
    yield (
        f"Over LoRA: SpIEL in Ansell et al. 2024 (7B, on an A100), and here over {LORA} (time: the mean of a cycle, "
        "where the rounds are enough for one)."
    )
    yield ""
    columns = [f"{what}, {where}" for what in ("memory", "time") for where in ("paper", *dtypes)]
    yield "| | " + " | ".join(columns) + " |"
    yield "| --- |" + " ---: |" * len(columns)
    for name, by_setting in PAPER.items():
        for checkpointing, (memory, time) in by_setting.items():
            rows = [_entry(data, dtype, checkpointing, name) for dtype in dtypes]
            over = [row.get("over_peer") or {} for row in rows]
            cells = [f"{name}, {_checkpointing(checkpointing)}", f"{memory:.2f}"]
            cells += [_ratio(row.get("memory_of_peer")) for row in rows]
            cells += [f"{time:.2f}", *(_ratio(ratios.get("cycle") or ratios.get("ordinary")) for ratios in over)]
            yield "| " + " | ".join(cells) + " |"


def _entry(data: Mapping[str, Any], dtype: str, checkpointing: bool, name: str) -> Mapping[str, Any]:
    for group in data["groups"]:
        if (group["dtype"], group["checkpointing"]) == (dtype, checkpointing):
            entry: Mapping[str, Any] = group["entries"].get(name, {})
            return entry
    return {}


def _scaled(value: float | None, factor: float) -> str:
    return "-" if value is None else f"{factor * value:.0f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
