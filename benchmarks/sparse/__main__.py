"""The command of the benchmark of sparse deltas.

    python -m benchmarks.sparse [--rounds 40] [--only SpIEL] [--dtype bfloat16] [--checkpointing off] [--quick]

Writes sparse.json and sparse.md. Times are those of alternated rounds in this process; the memory of each entry is
measured in a process of its own.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch

from benchmarks.command import chosen, command_line, parse, parser, write
from benchmarks.hardware import device
from benchmarks.sparse.entries import ENTRIES, FULL_SHAPE, TINY_SHAPE, Entry, base_in
from benchmarks.sparse.memory import in_process_of_its_own
from benchmarks.sparse.report import as_markdown, group_figures
from benchmarks.sparse.times import contest, mismatches
from benchmarks.train.models import Shape
from benchmarks.train.report import PACKAGES, machine

DTYPES = ("float32", "bfloat16")
CHECKPOINTING = {"off": False, "on": True}


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if graftc's LoRA differs from peft's, or entries train unequal numbers of values."""
    prog = "python -m benchmarks.sparse"
    options_of = parser(prog, "Time and memory of whole training steps.", 40)
    options_of.add_argument("--only", metavar="REGEX", help="entries with such names, with the floor and peft LoRA")
    options_of.add_argument("--dtype", choices=DTYPES, help="of the base (default: both)")
    options_of.add_argument("--checkpointing", choices=CHECKPOINTING, help="of activations (default: both)")
    options_of.add_argument("--vocabulary", type=int, help=f"of the model (default: {FULL_SHAPE.vocabulary})")
    options_of.add_argument("--device", default=str(device()), help="cpu or cuda (default: a GPU if there is one)")
    options = parse(options_of, arguments)
    entries = chosen(ENTRIES, options.only)
    if len(entries) < 2:
        options_of.error(f"no entry is called {options.only!r}; there are {', '.join(e.name for e in ENTRIES)}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    shape, rounds = (TINY_SHAPE, min(options.rounds, 2)) if options.quick else (FULL_SHAPE, options.rounds)
    if options.vocabulary is not None:
        shape = replace(shape, vocabulary=options.vocabulary)
    date, before = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), machine()
    wrong: list[str] = []
    groups = []
    for dtype in DTYPES if options.dtype is None else (options.dtype,):
        for name, checkpointing in CHECKPOINTING.items():
            if options.checkpointing in (None, name):
                _tell(f"{dtype}, checkpointing {name}")
                fitting = [entry for entry in entries if entry.dtypes is None or dtype in entry.dtypes]
                group = _group(
                    fitting, shape, dtype, checkpointing, rounds, options.device, options.threads, wrong.append
                )
                groups.append(group)
    data = {
        "machine": {**before, "load_after": machine()["load"]},
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU",
        "versions": {package: version(package) for package in PACKAGES},
        "command": command_line(prog, arguments),
        "date": date,
        "model": asdict(shape),
        "rounds": rounds,
        "groups": groups,
    }
    write(options.out, "sparse", data, as_markdown(data))
    for line in wrong:
        _tell(line)
    return 1 if wrong else 0


def _group(
    entries: Sequence[Entry],
    shape: Shape,
    dtype: str,
    checkpointing: bool,
    rounds: int,
    device: str,
    threads: int | None,
    complain: Callable[[str], None],
) -> dict[str, Any]:
    """Measure the times, then the memory once the models of the times are freed."""
    measured, skipped = contest(entries, base_in(shape, dtype, device), checkpointing, rounds, tell=_tell)
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    memory: dict[str, Mapping[str, Any]] = {}
    for timed in measured:
        memory[timed.entry.name] = figures = in_process_of_its_own(
            timed.entry, shape, dtype, checkpointing, device=device, threads=threads
        )
        _tell(f"{timed.entry.name}: {figures['peak_bytes'] / 1e6:.0f} MB at the peak")
    if dtype == "float32":
        for line in mismatches(measured):
            complain(line)
    for line in _unequal(memory):
        complain(f"{dtype}: {line}")
    return group_figures(measured, memory, skipped, dtype=dtype, checkpointing=checkpointing)


def _unequal(memory: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield a line for each low-rank or sparse entry that trains over 1 % fewer values than the largest of them."""
    counts = {name: figures["trained_parameters"] for name, figures in memory.items() if name not in ("floor", "full")}
    wanted = max(counts.values(), default=0)
    for name, count in counts.items():
        if count < 0.99 * wanted:
            yield f"{name}: trains {count} values, others {wanted}"


if __name__ == "__main__":
    sys.exit(main())
