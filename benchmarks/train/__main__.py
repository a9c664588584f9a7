"""The command of the benchmark of training steps.

    python -m benchmarks.train [--rounds 15] [--only DoRA] [--quick] [--threads N] [--out benchmarks/results]

Writes train.json, train.md and, if matplotlib is installed, train.png and train.svg.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from benchmarks.command import chosen, parse, parser, timed, verdict, write
from benchmarks.train.by_hand import by_hand
from benchmarks.train.contestants import ENTRIES as METHODS
from benchmarks.train.plot import plot
from benchmarks.train.report import as_markdown

ENTRIES = (*METHODS[:3], by_hand("LoRA by hand", "peft LoRA"), *METHODS[3:])
"""All entries; a Llama with hand-written kernels is next to LoRA."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if an entry does not compute what its peer does."""
    prog = "python -m benchmarks.train"
    options_of = parser(prog, "What a training step costs.", 15)
    options_of.add_argument("--only", metavar="REGEX", help="entries with such names, with the floor and their peers")
    options = parse(options_of, arguments)
    entries = chosen(ENTRIES, options.only)
    if len(entries) < 2:
        options_of.error(f"no entry is called {options.only!r}; there are {', '.join(e.name for e in ENTRIES)}")
    measured, data = timed(prog, options, entries, arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    pictures = [options.out / f"train.{kind}" for kind in ("png", "svg")]
    try:
        plot(data, pictures)
    except ImportError:
        print("no plot: pip install 'graftc[bench]'", file=sys.stderr)
        pictures = []
    write(options.out, "train", data, as_markdown(data, pictures[0].name if pictures else None))
    print(f"written: {os.path.relpath(options.out)}/train.*", file=sys.stderr)
    return verdict(measured)


if __name__ == "__main__":
    sys.exit(main())
