"""Compute the figures of the results, and write the page that shows them.

    python -m experiments PART [--quick] [--only REGEX] [--jobs N] [--out FOLDER]
    python -m experiments page
    python -m experiments pictures

Stored cells are not computed again, unless what they depend on has changed: the cell, the code that computes it, the
method's own modules, the model's files, or a version.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.plans import parts
from experiments.store import FOLDER, Store

QUICK = Path("build/experiments")


def _expression(text: str) -> str:
    """Return a regular expression that compiles."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"not a regular expression: {error}") from None
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 1 if a cell failed."""
    parser = argparse.ArgumentParser(prog="python -m experiments", description="The figures of docs/results.md.")
    parser.add_argument(
        "command", choices=[*parts(), "page", "pictures"], help="the part to run, or what to write: docs/results*"
    )
    parser.add_argument("--quick", action="store_true", help=f"tiny models and few steps, stored in {QUICK}")
    names = "part/model/dtype/task/name/rate/seed"
    parser.add_argument("--only", type=_expression, metavar="REGEX", help=f"cells whose {names} matches")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with one thread (default: 1)")
    parser.add_argument("--out", type=Path, help=f"folder of the cells (default: {FOLDER})")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error("--jobs has to be at least 1")
    folder = options.out or (QUICK if options.quick else FOLDER)
    if options.command == "page":
        from experiments.page import write

        write(folder)
        return 0
    if options.command == "pictures":
        from experiments.pictures import draw

        for path in draw(folder):
            print(path)
        return 0
    # Both are read when the libraries are imported, which running a cell does.
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    from experiments.running import run

    part = parts(options.quick)[options.command]
    cells = part.plan(Store(part.name, folder).known)
    if not any(options.only is None or re.search(options.only, str(cell)) for cell in cells):
        parser.error(f"no cell matches --only {options.only}")
    return 1 if run(part, only=options.only, jobs=options.jobs, folder=folder) else 0


if __name__ == "__main__":
    sys.exit(main())
