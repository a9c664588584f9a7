"""``python -m tools.docs``: write the generated pages of docs/, or name the stale ones with ``--check``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools.docs.pages import DOCS, render_all, stale_pages, write_pages


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return the exit status: 1 if ``--check`` finds a stale page."""
    parser = argparse.ArgumentParser(prog="python -m tools.docs", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 and name the pages that are stale")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the pages (docs)")
    options = parser.parse_args(arguments)
    pages = render_all()
    if options.check:
        stale = stale_pages(pages, options.docs)
        for name in stale:
            print(f"stale: {options.docs / name}", file=sys.stderr)
        if stale:
            print("run `make docs`", file=sys.stderr)
        return 1 if stale else 0
    for name in write_pages(pages, options.docs):
        print(f"written: {options.docs / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
