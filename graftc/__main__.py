"""``python -m graftc``: the command line."""

from __future__ import annotations

from graftc.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
