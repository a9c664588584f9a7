"""The benchmark's command.

    python -m benchmarks.train [--rounds 15] [--only DoRA] [--quick] [--threads N] [--out benchmarks/results]

Writes train.json, train.md, and train.png and train.svg where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.train.contestants import ENTRIES, Entry
from benchmarks.train.measure import contest, mismatches
from benchmarks.train.models import FULL, TINY, base
from benchmarks.train.plot import plot
from benchmarks.train.report import FLOOR, as_markdown, figures, machine

RESULTS = Path(__file__).parents[1] / "results"


def chosen(pattern: str | None) -> tuple[Entry, ...]:
    """Entries whose names a regular expression finds, with the floor and their peers."""
    if pattern is None:
        return ENTRIES
    found = {entry.name: entry for entry in ENTRIES if re.search(pattern, entry.name)}
    wanted = {FLOOR, *found, *(entry.peer for entry in found.values())}
    return tuple(entry for entry in ENTRIES if entry.name in wanted)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 where an entry does not compute what its peer does."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description="What a training step costs.")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each entry (default: 15)")
    parser.add_argument("--only", metavar="REGEX", help="entries with such names, with the floor and their peers")
    parser.add_argument("--quick", action="store_true", help="a tiny model and two rounds: is everything there?")
    parser.add_argument("--threads", type=int, help="of torch (default: as many as it takes)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: benchmarks/results)")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds has to be at least 1")
    entries = chosen(options.only)
    if len(entries) < 2:
        parser.error(f"no entry is called {options.only!r}; there are {', '.join(e.name for e in ENTRIES)}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    shape, rounds = (TINY, min(options.rounds, 2)) if options.quick else (FULL, options.rounds)
    date, before = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), machine()
    found, skipped = contest(entries, base(shape), rounds, tell=lambda line: print(line, file=sys.stderr, flush=True))
    given = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python -m benchmarks.train", *(f"'{a}'" if re.search(r"[^\w./-]", a) else a for a in given)])
    data = figures(found, skipped, shape, command=command, date=date, before=before)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "train.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    pictures = [options.out / f"train.{kind}" for kind in ("png", "svg")]
    try:
        plot(data, pictures)
    except ImportError:
        print("no plot: pip install 'graftc[bench]'", file=sys.stderr)
        pictures = []
    text = as_markdown(data, pictures[0].name if pictures else None)
    (options.out / "train.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"written: {os.path.relpath(options.out)}/train.*", file=sys.stderr)
    wrong = mismatches(found)
    for name, difference in wrong.items():
        print(f"{name}: its loss is not its peer's: {difference:.1e} apart", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
