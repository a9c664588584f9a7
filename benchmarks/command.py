"""Helpers for the commands of the benchmarks that time entries in alternated rounds."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from benchmarks.train.contestants import Entry
from benchmarks.train.measure import Measured, contest, mismatches
from benchmarks.train.models import FULL, TINY, base
from benchmarks.train.report import FLOOR, figures, load_text, machine
from benchmarks.turns import Named

RESULTS = Path(__file__).parent / "results"


def parser(prog: str, description: str, rounds: int) -> argparse.ArgumentParser:
    """Build a parser with the options that all of these commands take."""
    options = argparse.ArgumentParser(prog=prog, description=description)
    options.add_argument("--rounds", type=int, default=rounds, help=f"timed steps of each entry (default: {rounds})")
    options.add_argument("--quick", action="store_true", help="a tiny model and two rounds: is everything there?")
    options.add_argument("--threads", type=int, help="of torch (default: as many as it takes)")
    options.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of the results (default: benchmarks/results)"
    )
    return options


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the options."""
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds has to be at least 1")
    return options


def command_line(prog: str, arguments: Sequence[str] | None) -> str:
    """Return the command line as the user typed it."""
    given = sys.argv[1:] if arguments is None else arguments
    return " ".join([prog, *(f"'{a}'" if re.search(r"[^\w./-]", a) else a for a in given)])


class Compared(Named, Protocol):
    """An entry of a table that may be compared with another one."""

    @property
    def peer(self) -> str | None:
        """The name of the entry that it is compared with."""


N = TypeVar("N", bound=Compared)


def chosen(entries: Sequence[N], pattern: str | None) -> tuple[N, ...]:
    """Return the entries whose names match a regular expression, with the floor and their peers; None selects all."""
    if pattern is None:
        return tuple(entries)
    matching = [entry for entry in entries if re.search(pattern, entry.name)]
    wanted = {FLOOR, *(entry.name for entry in matching), *(entry.peer for entry in matching)}
    return tuple(entry for entry in entries if entry.name in wanted)


def timed(
    prog: str, options: argparse.Namespace, entries: Sequence[Entry], arguments: Sequence[str] | None
) -> tuple[list[Measured], dict[str, Any]]:
    """Run the rounds, and return the measurement of each entry and the figures."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    shape, rounds = (TINY, min(options.rounds, 2)) if options.quick else (FULL, options.rounds)
    date, before = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), machine()
    results, skipped = contest(entries, base(shape), rounds, tell=lambda line: print(line, file=sys.stderr, flush=True))
    command = command_line(prog, arguments)
    return results, figures(results, skipped, shape, command=command, date=date, before=before)


def write(out: Path, name: str, data: Mapping[str, Any], text: str) -> None:
    """Write the figures as ``<name>.json`` and ``<name>.md``, and print the text."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)


def verdict(found: Sequence[Measured]) -> int:
    """Return 1 if an entry does not compute what its peer does, after naming it on the error stream; otherwise 0."""
    wrong = mismatches(found)
    for name, difference in wrong.items():
        print(f"{name}: its loss is not its peer's: {difference:.1e} apart", file=sys.stderr)
    return 1 if wrong else 0


def machine_line(data: Mapping[str, Any]) -> str:
    """Describe the machine and the number of rounds in one line of text."""
    host = data["machine"]
    before, after = load_text(host["load"]), load_text(host["load_after"])
    return (
        f"Machine: {host.get('gpu') or host['processor']}, "
        f"{host['cores']} cores, {host['threads']} threads, {host['capability']}; "
        f"load {before} before and {after} after. Medians of {data['rounds']} alternated rounds; an aim stands in "
        "brackets, **bold** where it was missed."
    )
