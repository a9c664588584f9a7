"""Compute the figures of the results, and write the page that shows them.

    python -m experiments PART [--quick] [--only REGEX] [--jobs N] [--out FOLDER] [--prune]
    python -m experiments page [--out FOLDER]
    python -m experiments pictures [--out FOLDER]

Stored cells are not computed again, unless what they depend on has changed: the cell, the code that computes it, the
method's own modules, the model's files, or a version. ``--out`` is the folder of the cells; the page and the pictures
are always those of ``docs``.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from experiments.plans import parts
from experiments.store import FOLDER, Store, StoreError

QUICK = Path("build/experiments")
_WRITTEN = ("page", "pictures")
_INTERRUPTED = 130
"""The exit status of shells for a command that Ctrl-C has ended."""


def _expression(text: str) -> str:
    """Return a regular expression that compiles."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"not a regular expression: {error}") from None
    return text


def _folder(text: str) -> Path:
    """Return a path that is a folder or does not exist yet."""
    path = Path(text)
    if not text or (os.path.lexists(path) and not path.is_dir()):
        raise argparse.ArgumentTypeError(f"not a folder: {text or 'an empty path'}")
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 1 if a cell failed, or a file of cells is damaged."""
    parser = argparse.ArgumentParser(prog="python -m experiments", description="The figures of docs/results.md.")
    parser.add_argument(
        "command", choices=[*parts(), *_WRITTEN], help="the part to run, or what to write: docs/results*"
    )
    parser.add_argument("--quick", action="store_true", help=f"tiny models and few steps, stored in {QUICK}")
    names = "part/model/dtype/task/name/rate/seed"
    parser.add_argument("--only", type=_expression, metavar="REGEX", help=f"cells whose {names} matches")
    parser.add_argument("--jobs", type=int, help="processes, each with one thread (default: 1)")
    parser.add_argument("--out", type=_folder, help=f"folder of the cells (default: {FOLDER})")
    parser.add_argument("--prune", action="store_true", help="drop stored cells that the part does not plan")
    options = parser.parse_args(arguments)
    if options.jobs is not None and options.jobs < 1:
        parser.error("--jobs has to be at least 1")
    try:
        return _write(parser, options) if options.command in _WRITTEN else _run(parser, options)
    except StoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _write(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Write the page or the pictures from stored cells; say which are missing or out of date."""
    for name in ("quick", "only", "jobs", "prune"):
        if getattr(options, name):
            parser.error(f"{options.command} does not take --{name}: it shows all cells of a folder, {FOLDER}")
    folder = options.out or FOLDER
    if not any(Store(name, folder).records() for name in parts()):
        parser.error(f"no cells are stored in {folder}")
    from experiments.staleness import gaps

    for gap in gaps(folder):
        print(f"warning: {gap}", file=sys.stderr)
    if options.command == "page":
        from experiments.page import write

        write(folder)
    else:
        from experiments.pictures import draw

        for path in draw(folder):
            print(path)
    return 0


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Compute the cells of a part."""
    folder = options.out or (QUICK if options.quick else FOLDER)
    # Both are read when the libraries are imported, which running a cell does.
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    from experiments.running import run

    part = parts(options.quick)[options.command]
    cells = part.plan(Store(part.name, folder).known)
    if not any(options.only is None or re.search(options.only, str(cell)) for cell in cells):
        parser.error(f"no cell matches --only {options.only}")
    failed = run(part, only=options.only, jobs=options.jobs or 1, folder=folder, prune=options.prune)
    return 1 if failed else 0


def ended_by(command: Callable[[], int]) -> NoReturn:
    """Run a command and end the process with its status, without a traceback if it is interrupted."""
    try:
        sys.exit(command())
    except KeyboardInterrupt:
        print("interrupted: what is stored stays, and the same command computes the rest", file=sys.stderr, flush=True)
        os._exit(_INTERRUPTED)  # without waiting for the processes of cells, which end with this one


if __name__ == "__main__":
    ended_by(main)
