"""Methods beside peft's: lines of code, trained parameters, and a training step.

    python -m benchmarks.methods [--rounds 15] [--only OFT] [--quick] [--threads N] [--out benchmarks/results]

Writes methods.json and methods.md. The model and the measurement are those of `benchmarks.train`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import chosen, machine_line, parse, parser, timed, verdict, write
from benchmarks.train.contestants import Aims, Entry, floor, ours, peer
from benchmarks.train.report import cell

METHODS: Mapping[str, tuple[str, str]] = {
    "OFT": ("oft", "oft"),
    "BOFT": ("boft", "boft"),
    "HiRA": ("hira", "hira"),
    "MiSS": ("miss", "miss"),
    "MiSS, bat": ("miss", "miss"),
    "GraLoRA": ("gralora", "gralora"),
    "C3A": ("c3a", "c3a"),
    "SHiRA": ("shira", "shira"),
    "Lily": ("lily", "lily"),
}
"""For each method, its tag and the package of peft that contains it."""

ALONE: Mapping[str, str] = {"LoReFT": "loreft"}
"""Methods that peft does not have."""


def _entries() -> Iterator[Entry]:
    yield floor()
    sides: Mapping[str, tuple[tuple[str, dict[str, Any]], dict[str, Any]]] = {
        "OFT": (("OFTConfig", {"ranked": None, "oft_block_size": 16}), {"block_size": 16}),
        "BOFT": (("BOFTConfig", {"ranked": None, "boft_block_size": 8}), {"block_size": 8}),
        "HiRA": (("HiraConfig", {"ranked": None, "r": 8}), {"rank": 8}),
        "MiSS": (("MissConfig", {"ranked": None, "r": 16}), {"rank": 16}),
        "MiSS, bat": (
            ("MissConfig", {"ranked": None, "r": 16, "init_weights": "bat"}),
            {"rank": 16, "variant": "bat"},
        ),
        "GraLoRA": (
            ("GraloraConfig", {"ranked": None, "r": 8, "alpha": 16, "gralora_k": 2}),
            {"rank": 8, "alpha": 16, "k": 2},
        ),
        "C3A": (("C3AConfig", {"ranked": None, "block_size": 64}), {"block_size": 64}),
        "SHiRA": (("ShiraConfig", {"ranked": None, "r": 8}), {"rank": 8}),
        "Lily": (
            ("LilyConfig", {"ranked": None, "r": 8, "stride_A": 2, "num_B": 2}),
            {"rank": 8, "stride_a": 2, "num_b": 2},
        ),
    }
    for name, ((config, theirs), mine) in sides.items():
        yield peer(f"peft {name}", config, **theirs)
        yield ours(f"graftc {name}", METHODS[name][0], f"peft {name}", Aims(), ranked=False, exact=False, **mine)
    for name, tag in ALONE.items():
        target = {"role": "layer.out"}
        yield ours(f"graftc {name}", tag, "floor", Aims(), ranked=False, exact=False, rank=8, target=target)


ENTRIES: tuple[Entry, ...] = tuple(_entries())


def lines(tag: str) -> int:
    """Return the number of lines of a method's two modules."""
    modules = (f"graftc.specs.methods.{tag}", f"graftc.passes.methods.{tag}")
    return sum(_length(Path(str(importlib.import_module(module).__file__))) for module in modules)


def peft_lines(package: str) -> int:
    """Return the number of lines of a method's package in peft."""
    folder = Path(str(importlib.import_module(f"peft.tuners.{package}").__file__)).parent
    return sum(_length(path) for path in folder.glob("*.py"))


def _length(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def as_markdown(data: Mapping[str, Any]) -> str:
    """Return the table of all methods."""
    rows = [
        "# Methods: graftc and peft",
        "",
        f"Made by `{data['command']}` on {data['date']}; [how to read it](../README.md).",
        "",
        machine_line(data),
        "",
        "| method | lines | peft's lines | trained | peft's | step, ms | over the floor | over peft | saved |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, own in data["entries"].items():
        title = name.removeprefix("graftc ")
        if title not in data["lines"]:
            continue
        theirs = data["entries"].get(f"peft {title}")
        cells = [title, *(str(count) if count is not None else "-" for count in data["lines"][title])]
        cells += [f"{own['trained_parameters']:,}", f"{theirs['trained_parameters']:,}" if theirs else "-"]
        cells += [f"{1e3 * own['seconds']['median']:.0f}", cell(own, "over_floor")]
        cells += [cell(own, "over_peer"), cell(own, "saved_of_peer")] if theirs else ["-", "-"]
        rows.append("| " + " | ".join(cells) + " |")
    rows += [f"\nSkipped: {name} ({reason})." for name, reason in data["skipped"].items()]
    return "\n".join(rows) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if an entry does not compute what its peer does."""
    prog = "python -m benchmarks.methods"
    options_of = parser(prog, "What methods cost, beside peft's.", 15)
    options_of.add_argument("--only", metavar="REGEX", help="entries with such names, with the floor and their peers")
    options = parse(options_of, arguments)
    measured, data = timed(prog, options, chosen(ENTRIES, options.only), arguments)
    counts = {name: [lines(tag), peft_lines(package)] for name, (tag, package) in METHODS.items()}
    data["lines"] = counts | {name: [lines(tag), None] for name, tag in ALONE.items()}
    write(options.out, "methods", data, as_markdown(data))
    return verdict(measured)


if __name__ == "__main__":
    sys.exit(main())
