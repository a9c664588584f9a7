"""``python -m tools.coverage``: examine every entry and write docs/coverage.json and docs/coverage.md."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from tools.coverage.catalogue import entries
from tools.coverage.page import write_page
from tools.coverage.run import SECONDS, WORK, Kept, Limits, examine_all, state, versions
from tools.sources import ROOT


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.coverage", description=__doc__)
    parser.add_argument("-j", "--jobs", type=int, default=2, help="processes at a time (2)")
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="examine everything again (default: go on where a run of the same sources and versions was)",
    )
    parser.add_argument("--any-sources", action="store_true", help="use kept records of other sources too")
    parser.add_argument(
        "--again", metavar="REGEX", help="with --any-sources: but not those of matching class or reason"
    )
    parser.add_argument("--only", metavar="REGEX", help="only matching classes; nothing is written to docs")
    parser.add_argument("--seconds", type=int, default=SECONDS, help=f"CPU time that a class may take ({SECONDS})")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the records (build/coverage)")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the page (docs)")
    options = parser.parse_args(arguments)
    chosen = [e for e in entries() if not options.only or re.search(options.only, e.name)]
    kept = Kept(options.work, state(), options.any_sources)
    if options.fresh or options.again:
        kept.forget(
            lambda record: (
                options.fresh or bool(re.search(options.again, f"{record['class']} {record.get('reason', '')}"))
            ),
            chosen,
        )
    records = examine_all(
        chosen,
        kept,
        jobs=max(1, options.jobs),
        limits=Limits(seconds=options.seconds),
        tell=lambda text: print(text, flush=True),
    )
    if not options.only:
        print(write_page(records.values(), versions(), options.docs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
