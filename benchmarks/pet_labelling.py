"""The cost of a row when four LoRA members label in one batched pass, beside one member alone.

    python -m benchmarks.pet_labelling [--rounds 9] [--out benchmarks/results]

The model is MiniLM with a masked-language-modelling head, on texts of 20 Newsgroups in patterns, up to 64 tokens, with
LoRA of rank 8 on all projections. The batch of the bank has each of 16 texts in four patterns, every row with its own
adapter. The member alone has one pattern and a batch of the same number of rows, which is what labelling takes at a
time, or of the 16 texts; a larger batch costs more per row by itself. Passes alternate, and encoding is measured as
well.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import graftc
from benchmarks.command import RESULTS, command_line, write
from benchmarks.masked_minilm import find_masked_minilm
from benchmarks.pet import LORA
from benchmarks.pet_data import few
from graftc.applications.pet.encoding import ClozeEncoder
from graftc.specs.pet.io import load_pet_spec

TOKENS, TEXTS = 64, 16
FOUR, ONE, FEWER = "four members in one pass", "one member alone, 64 rows", "one member alone, 16 rows"
PATTERNS = [
    "{text} This text is about {blank}.",
    "Topic: {blank}. {text}",
    "{blank} news: {text}",
    "A discussion of {blank}: {text}",
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if a row costs more than 1.3 times as much."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    prog = "python -m benchmarks.pet_labelling"
    parser = argparse.ArgumentParser(prog=prog, description="What a row costs where four members label at once.")
    parser.add_argument("--rounds", type=int, default=9, help="timed passes of each")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where files are written")
    options = parser.parse_args(arguments)
    folder = find_masked_minilm()
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    task = few("newsgroups", 1, TEXTS * len(PATTERNS), 1)
    every = [{"text": text} for text in task.unlabelled]
    rows = every[:TEXTS]
    pet = load_pet_spec({"patterns": PATTERNS, "verbalizer": {name: name for name in task.names}})
    encoder = ClozeEncoder.of(pet, tokenizer, TOKENS)
    names = [f"member_{number}" for number in range(len(PATTERNS))]
    bank = {"bank": names, "name": "members"}
    adapt = [{**LORA, "name": name} for name in names]
    one = graftc.compile({"adapt": adapt[:1], "cloze": encoder.options([0])}, model).eval()
    four = graftc.compile({"adapt": adapt, "compose": bank, "cloze": encoder.options()}, model).eval()
    slots = [number for _ in rows for number in range(len(names))]
    copies = [row for row in rows for _ in names]
    chosen = {"adapter_ids": torch.tensor(slots)}
    if len(encoder.options()["verbalizers"]) > 1:
        chosen["pattern"] = torch.tensor(slots)

    def at_once() -> Any:
        return four(**encoder.encode(copies, slots), **chosen).logits

    runs: dict[str, tuple[Callable[[], Any], int]] = {
        FEWER: (lambda: one(**encoder.encode(rows, 0)).logits, len(rows)),
        ONE: (lambda: one(**encoder.encode(every, 0)).logits, len(every)),
        FOUR: (at_once, len(copies)),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for counted in range(-1, options.rounds):
            for name, (run, count) in runs.items():
                seconds = _timed(run) / count
                if counted >= 0:
                    times[name].append(1000 * seconds)
    ratios = {name: [a / b for a, b in zip(times[FOUR], times[name], strict=True)] for name in (ONE, FEWER)}
    data = {
        "command": command_line(prog, arguments),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "threads": torch.get_num_threads(),
        "milliseconds": times,
        "ratios": {name: statistics.median(own) for name, own in ratios.items()},
    }
    lines = [
        "# Labelling with four patterns at once",
        "",
        f"Made by `{data['command']}` on {data['date']}, {data['threads']} threads; [how to read it](../README.md).",
        "",
        "| | ms a row, median | least | most |",
        "| --- | ---: | ---: | ---: |",
        *(
            f"| {name} | {statistics.median(own):.1f} | {min(own):.1f} | {max(own):.1f} |"
            for name, own in times.items()
        ),
        "",
        *(
            f"- A row of the pass costs {statistics.median(own):.2f} of a row of {name} (median of rounds, "
            f"{min(own):.2f} to {max(own):.2f})."
            for name, own in ratios.items()
        ),
    ]
    write(options.out, "pet_labelling", data, "\n".join(lines) + "\n")
    return int(max(data["ratios"].values()) > 1.3)


def _timed(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
