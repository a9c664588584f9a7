"""The peak memory of a training step with LoRA: graftc beside peft, with small and real vocabularies.

    python -m benchmarks.memory [--rounds 10] [--vocabulary 1000 ...] [--quick] [--threads N] [--out benchmarks/results]

Writes memory.json and memory.md. The model, the batch and the way of measuring are those of `benchmarks.train`; the
head of a real vocabulary takes most of the time of a step, and its logits take most of the memory.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import torch

from benchmarks.command import command_line, machine_line, parse, parser, verdict, write
from benchmarks.train.contestants import Aims, Entry, ours, peer
from benchmarks.train.measure import Measured, contest
from benchmarks.train.models import FULL, TINY, Base, base
from benchmarks.train.report import cell, figures, machine

VOCABULARIES = (1_000, 32_000, 128_256)
CHUNKED = {"memory": {"loss": "chunked"}}
_PEAKS = {32_000: 0.38, 128_256: 0.24}
"""The aims of the chunked loss by vocabulary, as a share of peft's peak."""


def entries(vocabulary: int) -> tuple[Entry, ...]:
    """Return the contestants for a vocabulary of some size."""
    lora = {"alpha": 16}
    small = Aims(over_peer=1.05, saved_of_peer=0.73, peak_of_peer=0.85) if vocabulary < 10_000 else Aims(over_peer=1.05)
    chunked = Aims(over_peer=1.1, peak_of_peer=_PEAKS.get(vocabulary))
    both = Aims(peak_of_peer=0.15 if vocabulary > 100_000 else None)
    layers = {"checkpoint": "layers"}
    return (
        peer("peft LoRA", "LoraConfig", lora_alpha=16),
        ours("graftc LoRA", "lora", "peft LoRA", small, **lora),
        ours(
            "graftc LoRA, budget 0.6",
            "lora",
            "peft LoRA",
            Aims(over_peer=1.25),
            document={"memory": {"budget": 0.6}},
            **lora,
        ),
        ours("graftc LoRA, chunked loss", "lora", "peft LoRA", chunked, document=CHUNKED, **lora),
        peer("peft LoRA, checkpointing", "LoraConfig", lora_alpha=16, checkpointed=True, against="peft LoRA"),
        ours("graftc LoRA, checkpointing", "lora", "peft LoRA, checkpointing", Aims(), document=layers, **lora),
        ours(
            "graftc LoRA, checkpointing, chunked loss",
            "lora",
            "peft LoRA, checkpointing",
            both,
            document={**layers, **CHUNKED},
            **lora,
        ),
    )


def half_labelled(given: Base) -> Base:
    """Return the same batch without labels for the first half of every text, as if the loss is on answers only."""
    labels = given.labels.clone()
    labels[:, : labels.shape[1] // 2] = -100
    return replace(given, labels=labels)


def half_entries(vocabulary: int) -> tuple[Entry, ...]:
    """Return the contestants for a batch in which half of the tokens have no labels."""
    aims = Aims(over_peer=0.75 if vocabulary > 100_000 else None)
    return (
        peer("peft LoRA, half labelled", "LoraConfig", lora_alpha=16),
        ours(
            "graftc LoRA, chunked loss, half labelled",
            "lora",
            "peft LoRA, half labelled",
            aims,
            document=CHUNKED,
            alpha=16,
        ),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if an entry does not compute what its peer does."""
    prog = "python -m benchmarks.memory"
    options_of = parser(prog, "What a training step takes at its peak.", 10)
    options_of.add_argument("--vocabulary", type=int, nargs="+", default=VOCABULARIES, help="sizes of vocabularies")
    options = parse(options_of, arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    rounds = min(options.rounds, 2) if options.quick else options.rounds
    by_vocabulary: list[list[Measured]] = []
    tables: dict[str, Any] = {}
    for vocabulary in (TINY.vocabulary,) if options.quick else options.vocabulary:
        shape = replace(TINY, layers=2) if options.quick else replace(FULL, vocabulary=vocabulary)
        date, before = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), machine()
        given = base(shape)
        runs = [contest(entries(vocabulary), given, rounds, tell=_tell)]
        runs.append(contest(half_entries(vocabulary), half_labelled(given), rounds, tell=_tell))
        measured = [one for run, _ in runs for one in run]
        skipped = {name: why for _, others in runs for name, why in others.items()}
        by_vocabulary.append(measured)
        tables[str(vocabulary)] = figures(
            measured, skipped, shape, command=command_line(prog, arguments), date=date, before=before
        )
    write(options.out, "memory", tables, "\n".join(_lines(tables)) + "\n")
    return max(verdict(measured) for measured in by_vocabulary)  # names repeat in each vocabulary


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _lines(tables: Mapping[str, Any]) -> Iterator[str]:
    first = next(iter(tables.values()))
    model = first["model"]
    yield "# The memory of a training step: graftc and peft"
    yield ""
    yield f"Made by `{first['command']}` on {first['date']}; [how to read it](../README.md)."
    yield ""
    yield (
        f"Model: Llama-shaped, {model['width']} wide, {model['layers']} layers, batch {model['batch']} x "
        f"{model['length']}, LoRA of rank {model['rank']} on all seven projections, float32, eager."
    )
    for vocabulary, data in tables.items():
        yield ""
        yield f"## Vocabulary {int(vocabulary):,}"
        yield ""
        yield machine_line(data)
        yield ""
        yield "| | step, ms | over peft | saved, MB | of peft's | peak, MB | of peft's |"
        yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
        for name, entry in data["entries"].items():
            cells = [name, f"{1e3 * entry['seconds']['median']:.0f}", cell(entry, "over_peer")]
            cells += [f"{entry['saved_bytes'] / 1e6:.1f}", cell(entry, "saved_of_peer")]
            cells += [f"{entry['peak_bytes'] / 1e6:.1f}", cell(entry, "peak_of_peer")]
            yield "| " + " | ".join(cells) + " |"
        for name, why in data["skipped"].items():
            yield f"\nSkipped: {name} ({why})."


if __name__ == "__main__":
    sys.exit(main())
