"""A process that merges file by file in forks of itself, which are then killed: see `tests.kit.forks`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import graftc
from graftc.runtime.streaming import peft, sites
from tests.kit.forks import serve


def jobs(folder: Path) -> dict[str, Callable[[], object]]:
    """Return the work that can be requested."""
    assert peft is not None
    sites.BLOCK = 700
    graftc.merge_checkpoint(folder / "adapter", folder / "base")  # does one-time work before any fork
    return {"merge": lambda: graftc.merge_checkpoint(folder / "adapter", folder / "base", folder / "out" / "merged")}


if __name__ == "__main__":
    serve(jobs(Path(sys.argv[1])))
